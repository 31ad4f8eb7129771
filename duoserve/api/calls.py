"""Tool calls in a model's text: how a family writes them, as a grammar that forces them and as a parser that reads them
while they are written. Knows markers and JSON's outline; knows no tokens, requests or models.

    text ... <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>
    Content                Call(0, id, "f")  Arguments(0, '{"a"') Arguments(0, ": 1}")

The parser reads letter by letter, so where the text is cut makes no difference. It writes nothing that belongs to the format
and holds back what may yet: the beginning of a marker, and white space that turns out to stand before one.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

BLANK = " \n\r\t"
OUTSIDE = set('{}[]:,"+-.' + string.ascii_letters + string.digits + BLANK)  # what JSON has outside strings


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call has begun: the `index`th of this answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next letters of a call's arguments, which are JSON once they are all there."""

    index: int
    text: str


Delta = Content | Call | Arguments
Letters = Generator[None, str, None]  # is sent one letter at a time


@dataclass(frozen=True)
class Format:
    """How a family writes calls. `opens` begins each, or the list of them; `closes` ends it, or is empty.

    `id_letters`: of a call's id, where the family's template insists on their number.
    """

    name: str
    opens: str
    closes: str
    listed: bool
    id_letters: int | None = None

    def new_id(self) -> str:
        if self.id_letters is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(self.id_letters))

    def rules(self, marker: Callable[[str], str], bodies: Sequence[str], parallel: bool) -> str:
        """One call or more of these bodies, as the model was taught to write them, in llguidance's words."""
        opens, one = marker(self.opens), f"body: {' | '.join(bodies)}"
        if self.listed:
            more = '(", " body)*' if parallel else ""
            return f'start: {opens} /[ ]?/ "[" body {more} "]"\n{one}'
        more = '("\\n" call)*' if parallel else ""
        return f'start: call {more}\ncall: {opens} "\\n" body "\\n" {marker(self.closes)}\n{one}'


HERMES = Format("hermes", "<tool_call>", "</tool_call>", listed=False)
MISTRAL = Format("mistral", "[TOOL_CALLS]", "", listed=True, id_letters=9)

# What else templates write, by what betrays it; in the order to look for it, since some contain others' markers.
UNREAD = {
    "<arg_key>": "GLM's arguments",
    "<function=": "functions as XML",
    "[ARGS]": "Mistral's [ARGS]",
    "<|channel|>": "harmony",
    "tool▁calls▁begin": "DeepSeek's",
    "<|tool_calls_section_begin|>": "Kimi's",
    "<|python_tag|>": "Llama's",
    "<|action_start|>": "InternLM's",
    "<minimax:tool_call>": "MiniMax's",
    "<|tool_call|>": "Granite's",
    "functools[": "Phi's",
}


def format_of(template: str) -> Format | str:
    """The format that a template writes former calls in; the name of one that is not read, or "unknown"."""
    for sign, name in UNREAD.items():
        if sign in template:
            return name
    return next((format for format in (HERMES, MISTRAL) if format.opens in template), "unknown")


def body_rule(name: str, rule: str) -> str:
    """The object of a call, its arguments by another rule."""
    head = json.dumps(f'{{"name": "{name}", "arguments": ')
    return f'{head} {rule} "}}"'


class Malformed(Exception):
    """What stands where a call should is none."""


class Parser:
    """Reads one answer's text. `format` None: all of it is content."""

    def __init__(self, format: Format | None):
        self._format = format
        self._out: list[Delta] = []
        self._pending = ""  # what may become a marker
        self._blank = ""  # white space that may stand before one
        self._inside = ""  # of a call that has not begun yet: its letters
        self._begun = self._open = False
        self._unread = ""  # letters that were read and belong to what follows
        self.calls = 0
        self._reader = self._answer(format) if format is not None else None
        if self._reader is not None:
            next(self._reader)

    def put(self, text: str) -> list[Delta]:
        """What became certain with `text`."""
        if self._reader is None:
            return [Content(text)] if text else []
        for letter in text:
            self._reader.send(letter)
        return self._taken()

    def end(self, finish: str = "stop") -> list[Delta]:
        """What was held back, once no text follows. What may be the beginning of a marker is none if the text ended here."""
        held, self._pending = self._pending, ""
        if not self._open and finish != "length":
            for letter in held:
                self._say(letter)
        if not self._open and self.calls == 0:
            self._out.append(Content(self._blank))
        self._blank = ""
        return self._taken()

    def finish(self, finish: str) -> str:
        """OpenAI's finish_reason, given how the text ended."""
        return "tool_calls" if finish == "stop" and self.calls and not self._open else finish

    def _taken(self) -> list[Delta]:
        """Neighbours of one kind as one."""
        taken: list[Delta] = []
        for delta in self._out:
            last = taken[-1] if taken else None
            if isinstance(delta, Content) and isinstance(last, Content):
                taken[-1] = Content(last.text + delta.text)
            elif isinstance(delta, Arguments) and isinstance(last, Arguments) and last.index == delta.index:
                taken[-1] = Arguments(last.index, last.text + delta.text)
            else:
                taken.append(delta)
        self._out = []
        return [d for d in taken if isinstance(d, Call) or d.text]

    def _say(self, letter: str) -> None:
        if letter in BLANK:
            self._blank += letter
        else:
            self._out.append(Content(self._blank + letter))
            self._blank = ""

    # The grammar of an answer, letter by letter

    def _answer(self, format: Format) -> Letters:
        while True:
            yield from self._content_until(format.opens)
            self._open, self._blank = True, ""
            try:
                yield from self._calls(format)
            except Malformed:
                yield from self._as_content(format)
            self._open = False

    def _content_until(self, marker: str) -> Letters:
        while self._pending != marker:
            self._pending += yield from self._letter()
            while not marker.startswith(self._pending):
                self._say(self._pending[0])
                self._pending = self._pending[1:]
        self._pending = ""

    def _calls(self, format: Format) -> Letters:
        if not format.listed:
            again = True
            while again:  # its end may be forgotten
                yield from self._call(format)
                again = (yield from self._past(format.closes, format.opens)) == format.opens
            return
        if (yield from self._next()) != "[":
            raise Malformed
        letter = ","
        while letter != "]":
            if letter != ",":
                raise Malformed
            yield from self._call(format)
            letter = yield from self._next()

    def _as_content(self, format: Format) -> Letters:
        """A call that is none: all of it is content, as far as nothing was told of it yet."""
        if self._begun:
            yield from self._past(format.closes or "]")
            return
        self._unread, self._inside = self._inside, ""
        self._open, self._begun = False, True
        if format.closes:
            yield from self._content_until(format.closes)

    def _past(self, *markers: str) -> Generator[None, str, str]:
        seen = ""
        while True:
            seen = (seen + (yield from self._letter()))[-max(map(len, markers)) :]
            for marker in markers:
                if seen.endswith(marker):
                    return marker

    def _letter(self) -> Generator[None, str, str]:
        if self._unread:
            letter, self._unread = self._unread[0], self._unread[1:]
            return letter
        letter = yield
        if self._open and not self._begun:
            self._inside += letter
        return letter

    def _next(self) -> Generator[None, str, str]:
        """The next letter that is not white space."""
        while (letter := (yield from self._letter())) in BLANK:
            pass
        return letter

    def _call(self, format: Format) -> Letters:
        """{"name": ..., "arguments": ...}, in any order, among others."""
        self._open, self._begun, self._inside = True, False, self._unread
        held: list[str] = []  # arguments that came before the name
        told = False

        def tell(text: str) -> None:
            if self._begun:
                self._out.append(Arguments(self.calls - 1, text))
            else:
                held.append(text)

        if (yield from self._next()) != "{":
            raise Malformed
        letter = yield from self._next()
        while letter != "}":
            key = yield from self._string(letter)
            if (yield from self._next()) != ":":
                raise Malformed
            letter = yield from self._next()
            if key == "name" and not self._begun:
                name = yield from self._string(letter)
                self._begun, self._inside, self.calls = True, "", self.calls + 1
                self._out.append(Call(self.calls - 1, format.new_id(), name))
                tell("".join(held))
            elif key in ("arguments", "parameters") and not told:
                told = True
                if letter == '"':  # JSON within JSON
                    tell((yield from self._string(letter)))
                else:
                    yield from self._value(letter, tell)
            else:
                yield from self._value(letter, lambda text: None)
            letter = yield from self._next()
            if letter == ",":
                letter = yield from self._next()
            elif letter != "}":
                raise Malformed
        if not self._begun:
            raise Malformed
        if not told:
            tell("{}")
        self._open = False

    def _string(self, letter: str) -> Generator[None, str, str]:
        if letter != '"':
            raise Malformed
        raw: list[str] = []
        yield from self._value(letter, raw.append)
        try:
            return str(json.loads("".join(raw)))
        except ValueError as error:
            raise Malformed from error

    def _value(self, letter: str, tell: Callable[[str], None]) -> Letters:
        """One JSON value that begins with `letter`, as it is written."""
        if letter in ",]}:":
            raise Malformed
        depth, quoted, escaped = 0, False, False
        scalar = letter not in '{["'
        while True:
            if not quoted and letter not in OUTSIDE:
                self._unread = letter
                raise Malformed
            tell(letter)
            if escaped:
                escaped = False
            elif quoted:
                escaped, quoted = letter == "\\", letter != '"'
            elif letter == '"':
                quoted = True
            elif letter in "{[":
                depth += 1
            elif letter in "}]":
                depth -= 1
            if not scalar and depth == 0 and not quoted and not escaped:
                return
            letter = yield from self._letter()
            if scalar and (letter in BLANK or letter in ",}]"):
                self._unread = letter
                return
