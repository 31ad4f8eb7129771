"""POST /v1/completions: prompts as texts or token ids, several at once, echoed where asked. Knows OpenAI's replies."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from duoserve.api import asking
from duoserve.api.answers import Answers
from duoserve.api.chat import checked, total
from duoserve.api.errors import ApiError, of_failure
from duoserve.api.kit import Kit
from duoserve.api.schema import CompletionRequest
from duoserve.api.stream import DONE, PING, error_event, event
from duoserve.sampling import Logprob
from duoserve.service import End, Piece, Prompt, Request


async def prompt_ids(kit: Kit, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return await kit.rendering.text(prompt)
    vocabulary = kit.engine.model.config.get_text_config().vocab_size
    if max(prompt) >= vocabulary:
        raise ApiError(
            400,
            f"prompt: token {max(prompt)} is beyond the vocabulary of {vocabulary}",
            param="prompt",
            code="invalid_value",
        )
    return prompt


class Completions:
    """Choices are numbered prompt by prompt: n of the first, n of the second, ..."""

    def __init__(self, kit: Kit, asked: CompletionRequest, ids: list[list[int]], client: str):
        self._kit, self._asked, self._ids = kit, asked, ids
        self._n = asked.n or 1
        base = asking.sampling(asked, kit.engine, asked.logprobs)
        limit = 16 if asked.max_tokens is None else asked.max_tokens
        self.requests = [
            Request(
                prompt,
                limit,
                asking.seeded(base, choice),
                asked.stops,
                ignore_eos=asked.ignore_eos,
                prompt_logprobs=asked.logprobs if asked.echo else None,
                client=client,
            )
            for prompt in ids
            for choice in range(self._n)
        ]
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    async def whole(self, answers: Answers) -> Completion:
        count = len(self.requests)
        texts = [self._echo(n) for n in range(count)]
        drawn: list[list[Logprob | int]] = [self._first(n) for n in range(count)]
        ends: dict[int, End] = {}
        async for seen in answers.events():
            if seen is None:
                continue
            index, what = seen
            if isinstance(what, Piece):
                texts[index] += what.text
            if isinstance(what, Piece | Prompt):
                drawn[index] += what.logprobs
            elif isinstance(what, End):
                ends[index] = checked(what)
        choices = [self._choice(n, texts[n], drawn[n], ends[n].finish, 0) for n in range(count)]
        return self._of(choices, usage=self._usage(list(ends.values())))

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        told: dict[int, int] = {}  # characters, by choice
        ends: list[End] = []
        if self._asked.echo and self._asked.logprobs is None:
            for n in range(len(self.requests)):
                told[n] = len(self._echo(n))
                yield self._chunk(self._choice(n, self._echo(n), [], None, 0))
        async for seen in answers.events():
            if seen is None:
                yield PING
                continue
            index, what = seen
            if isinstance(what, End):
                if what.finish in ("error", "cancelled"):
                    yield error_event(of_failure(what.error))
                    return
                ends.append(what)
                yield self._chunk(self._choice(index, "", [], what.finish, told.get(index, 0)))
            elif isinstance(what, Piece):
                yield self._chunk(self._choice(index, what.text, list(what.logprobs), None, told.get(index, 0)))
                told[index] = told.get(index, 0) + len(what.text)
            elif self._asked.echo and self._asked.logprobs is not None:
                drawn = [*self._first(index), *what.logprobs]
                told[index] = len(self._echo(index))
                yield self._chunk(self._choice(index, self._echo(index), drawn, None, 0))
        if self._asked.usage_streamed:
            yield event(self._of([], usage=self._usage(ends)))
        yield DONE

    def _echo(self, n: int) -> str:
        if not self._asked.echo:
            return ""
        prompt = self._asked.prompts[n // self._n]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._kit.engine.tokenizer
        return tokenizer.decode(prompt, clean_up_tokenization_spaces=False) if tokenizer is not None else ""

    def _first(self, n: int) -> list[Logprob | int]:
        """Nothing came before a prompt's first token."""
        return [self._ids[n // self._n][0]] if self._asked.echo and self._asked.logprobs is not None else []

    def _choice(
        self, index: int, text: str, drawn: list[Logprob | int], reason: str | None, offset: int
    ) -> CompletionChoice:
        shown: Logprobs | None = None
        if self._asked.logprobs is not None:
            shown = self._kit.tokens.completion(drawn, offset)
        return CompletionChoice.construct(index=index, text=text, finish_reason=reason, logprobs=shown)

    def _chunk(self, choice: CompletionChoice) -> bytes:
        return event(self._of([choice], **({"usage": None} if self._asked.usage_streamed else {})))

    def _usage(self, ends: list[End]) -> Any:
        return total(sum(map(len, self._ids)), sum(end.new_tokens for end in ends))

    def _of(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        return Completion.construct(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._kit.host.name,
            system_fingerprint=self._kit.fingerprint,
            choices=choices,
            **more,
        )
