"""What the routes do once a model answers: ask it, reply whole or in events. Knows the parts; knows nothing of loading."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from duoserve.api.answers import Answers
from duoserve.api.chat import Chat
from duoserve.api.completions import Completions, prompt_ids
from duoserve.api.errors import of_busy
from duoserve.api.kit import Kit
from duoserve.api.progress import with_progress
from duoserve.api.reply import Reply
from duoserve.api.responses import Responses
from duoserve.api.responses_input import ResponsesRequest, answer_format, chat_choice, chat_tool, messages
from duoserve.api.schema import ChatRequest, CompletionRequest
from duoserve.api.stream import EventStream, while_there
from duoserve.api.turnstile import passed
from duoserve.service import Busy


class Handlers:
    def __init__(self, kit: Kit, stall_s: float):
        self._kit, self._stall_s = kit, stall_s

    async def chat(self, request: Request, asked: ChatRequest) -> Response:
        client = self._client(request, asked)
        parts = asked.model_dump(include={"tools", "tool_choice", "response_format"}, exclude_none=True, by_alias=True)
        prompt = await self._kit.rendering.chat(
            [message.plain for message in asked.messages],
            parts.get("tools"),
            parts.get("tool_choice"),
            asked.parallel_tool_calls is not False,
            parts.get("response_format"),
        )
        reply = Chat(self._kit, asked, prompt, client)
        return await self._answer(request, reply, asked.stream, asked.return_progress)

    async def completions(self, request: Request, asked: CompletionRequest) -> Response:
        client = self._client(request, asked)
        ids = [await prompt_ids(self._kit, prompt) for prompt in asked.prompts]
        reply = Completions(self._kit, asked, ids, client)
        return await self._answer(request, reply, asked.stream)

    async def responses(self, request: Request, asked: ResponsesRequest) -> Response:
        client = self._client(request, asked)
        parts = asked.model_dump(include={"tools", "tool_choice"}, exclude_none=True)
        prompt = await self._kit.rendering.chat(
            messages(asked),
            [chat_tool(tool) for tool in parts.get("tools", ())] or None,
            chat_choice(parts.get("tool_choice")),
            asked.parallel_tool_calls is not False,
            answer_format(asked),
        )
        reply = Responses(self._kit, asked, prompt, client)
        return await self._answer(request, reply, asked.stream)

    async def _answer(self, request: Request, reply: Reply, streamed: bool | None, progress: bool = False) -> Response:
        requests = [replace(one, arrived=request.state.arrived) for one in reply.requests]
        answers = Answers(self._kit.service, requests, self._kit.metrics)
        passed(request.scope)
        if streamed:
            events = reply.events(answers)
            if progress:
                events = with_progress(events, answers)
            return EventStream(events, answers.cancel, self._stall_s)
        try:
            whole = await while_there(request, reply.whole(answers))
        finally:
            answers.cancel()
        if whole is None:
            return Response(status_code=499)  # nobody is there to read it
        return Response(whole.model_dump_json(exclude_unset=True, by_alias=True), media_type="application/json")

    def _client(self, request: Request, asked: ChatRequest | CompletionRequest | ResponsesRequest) -> str:
        """Whose turn it is: an address, or one of its users. Who cannot be answered now hears so before any work."""
        self._kit.host.check_name(asked.model)
        host = request.client.host if request.client else ""
        client = f"{host} {asked.user}" if asked.user else host
        try:
            self._kit.service.refuse_full(client)
        except Busy as busy:
            raise of_busy(busy) from busy
        return client
