"""POST /v1/completions: prompts as texts or token ids, several at once, echoed where asked. Knows OpenAI's replies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs

from duoserve.api import asking
from duoserve.api.errors import ApiError
from duoserve.api.kit import Kit
from duoserve.api.reply import Reply
from duoserve.api.schema import CompletionRequest
from duoserve.api.stream import DONE, event
from duoserve.sampling import Logprob
from duoserve.service import End, Event, Piece, Prompt, Request


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


class Completions(Reply):
    """Choices are numbered prompt by prompt: n of the first, n of the second, ..."""

    def __init__(self, kit: Kit, asked: CompletionRequest, ids: list[list[int]], client: str):
        super().__init__(kit, "cmpl-")
        self._asked, self._ids = asked, ids
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
        count = range(len(self.requests))
        self._texts, self._drawn = [self._echo(n) for n in count], [self._before(n) for n in count]

    def _hear(self, index: int, what: Event) -> None:
        if isinstance(what, Piece):
            self._texts[index] += what.text
        if isinstance(what, Piece | Prompt):
            self._drawn[index] += what.logprobs

    def _made(self) -> Completion:
        told = enumerate(zip(self._texts, self._drawn, strict=True))
        choices = [self._choice(n, text, drawn, self._ends[n].finish, 0) for n, (text, drawn) in told]
        return self._of(choices, usage=self._used())

    def _first(self) -> Iterator[bytes]:
        """The prompts, where they are echoed without logprobs; with them they follow once they were read."""
        self._told = dict.fromkeys(range(len(self.requests)), 0)  # characters, by choice
        if self._asked.echo and self._asked.logprobs is None:
            for n in range(len(self.requests)):
                self._told[n] = len(self._echo(n))
                yield self._chunk(self._choice(n, self._echo(n), [], None, 0))

    def _tell(self, index: int, what: Event) -> Iterator[bytes]:
        if isinstance(what, End):
            yield self._chunk(self._choice(index, "", [], what.finish, self._told[index]))
        elif isinstance(what, Piece):
            yield self._chunk(self._choice(index, what.text, list(what.logprobs), None, self._told[index]))
            self._told[index] += len(what.text)
        elif self._asked.echo and self._asked.logprobs is not None:
            drawn = [*self._before(index), *what.logprobs]
            self._told[index] = len(self._echo(index))
            yield self._chunk(self._choice(index, self._echo(index), drawn, None, 0))

    def _last(self) -> Iterator[bytes]:
        if self._asked.usage_streamed:
            yield event(self._of([], usage=self._used()))
        yield DONE

    def _echo(self, n: int) -> str:
        if not self._asked.echo:
            return ""
        prompt = self._asked.prompts[n // self._n]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._kit.engine.tokenizer
        return tokenizer.decode(prompt, clean_up_tokenization_spaces=False) if tokenizer is not None else ""

    def _before(self, n: int) -> list[Logprob | int]:
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

    def _used(self) -> CompletionUsage:
        return self._usage(sum(map(len, self._ids)))

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
