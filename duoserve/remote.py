"""A conversation with a server instead of an engine of our own. Knows OpenAI's API as its client; knows no models."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import openai

from duoserve.conversation import Conversation
from duoserve.core import Refusal
from duoserve.engine import Answer


class Server:
    """Stands where an engine stands: answers messages, has figures. Refusal where nothing answers, or no such model."""

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise Refusal("E_URL", f"{url!r} is no address of a server", "write it like http://127.0.0.1:8000")
        self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=2)
        self.model = self._found(model)
        self.last: Answer | None = None
        self.seed: int | None = None

    def generate(
        self,
        messages: list[dict[str, str]],
        *,
        on_text: Callable[[str], None] | None = None,
        on_layer: Callable[[int, int], None] | None = None,
        on_reasoning: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Answer:
        """As `Conversation.say` of these messages; leaving the stream is what cancels. `on_layer` hears of tokens read."""
        began, first, text, finish, usage = time.perf_counter(), 0.0, "", "cancelled", None
        reasoning = ""
        with _refusing(self.url):
            stream = self._client.chat.completions.create(**self._asked(messages, options))
        with _refusing(self.url, begun=True), stream:
            for chunk in stream:
                usage = chunk.usage or usage
                if on_layer and (read := (chunk.model_extra or {}).get("prompt_progress")) and read["processed"]:
                    on_layer(read["processed"] - 1, read["total"])
                for choice in chunk.choices:
                    if thought := _reasoning(choice.delta):
                        first = first or time.perf_counter()
                        reasoning += thought
                        if on_reasoning:
                            on_reasoning(thought)
                    if choice.delta.content:
                        first = first or time.perf_counter()
                        text += choice.delta.content
                        if on_text:
                            on_text(choice.delta.content)
                    finish = choice.finish_reason or finish
                if cancelled and cancelled():
                    finish = "cancelled"
                    break
        now = time.perf_counter()
        prompt, new = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        rate = (new - 1) / (now - first) if new > 1 and now > first else None
        ttft_s = first - began if first else 0.0
        self.last = Answer(text, prompt, new, ttft_s, rate, finish, reasoning=reasoning)
        return self.last

    def stats(self) -> dict[str, Any]:
        """Of the last answer; the rest is at the server's /metrics."""
        last = self.last
        return {
            "url": self.url,
            "model": self.model,
            "prompt_tokens": last.prompt_tokens if last else 0,
            "new_tokens": last.new_tokens if last else 0,
            "ttft_s": last.ttft_s if last else None,
            "decode_tok_s": last.decode_tok_s if last else None,
        }

    def _asked(self, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.model, "messages": messages, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        asked["max_tokens"] = options.pop("max_new_tokens", None)
        if options.pop("do_sample", True) is False:
            asked["temperature"] = 0
        for name in ("temperature", "top_p"):
            if name in options:
                asked[name] = options.pop(name)
        if self.seed is not None:
            asked["seed"] = self.seed
        told = {"return_progress": True} if self._ours else {}
        return {k: v for k, v in asked.items() if v is not None} | {"extra_body": options | told}

    def _found(self, model: str | None) -> str:
        with _refusing(self.url):
            try:
                found = [each.to_dict() for each in self._client.models.list()]
            except (AttributeError, TypeError):  # what the client makes of any other site's page
                found = []
        names = [str(each["id"]) for each in found if isinstance(each.get("id"), str)]
        if not names:
            raise Refusal("E_URL", f"{self.url} serves 0 models by OpenAI's API", "check the address", 3)
        self._ours = all(each.get("owned_by") == "duoserve" for each in found)
        if model is not None and model not in names:
            raise Refusal("E_URL", f"{self.url} serves {', '.join(names)}, not {model}", "leave the model out", 3)
        return names[0]


class RemoteConversation(Conversation):
    """Turns of one chat; the server reads all of them each time."""

    unit = "token"

    def __init__(self, server: Server, system: str | None = None):
        super().__init__(server, system, reuse=False)  # type: ignore[arg-type]
        self.server = server

    def prompt(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages

    def seed(self, value: int) -> None:
        self.server.seed = value

    def _answer(self, **options: Any) -> Answer:
        return self.server.generate(self.prompt(), **options)


def _reasoning(delta: Any) -> str | None:
    """Beyond OpenAI's, by either of its usual names."""
    more = delta.model_extra or {}
    found = more.get("reasoning") or more.get("reasoning_content")
    return found if isinstance(found, str) else None


def _transport_errors() -> list[type[Exception]]:
    """Of the library that the client stands on, by its version one or the other: what breaks a stream passes through it."""
    return [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]


class _refusing:
    """The client's errors as refusals of one line. `begun`: an answer was under way."""

    def __init__(self, url: str, begun: bool = False):
        self._url, self._begun = url, begun

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (openai.APIConnectionError, *_transport_errors())):
            if self._begun:
                raise Refusal("E_URL", f"the answer of {self._url} broke off", "see that it runs, then ask again", 3)
            raise Refusal("E_URL", f"nothing answers at {self._url}", "start `duoserve serve`, or check the address", 3)
        if isinstance(error, openai.APIError):
            body = error.body if isinstance(error.body, dict) else {}
            what = body.get("message") or str(error)
            raise Refusal("E_URL", f"the server says: {what}", "see its log, or ask for less", 3) from error
        if isinstance(error, json.JSONDecodeError):
            raise Refusal("E_URL", f"what {self._url} says is no JSON", "check the address", 3) from error
