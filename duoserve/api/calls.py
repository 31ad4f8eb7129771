"""Tool calls in a model's text, read while they are written. Knows markers, JSON's outline and letters; knows no family by
name (those are in `formats.py`), no tokens, requests or models.

    text ... <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>
    Content                Call(0, id, "f")  Arguments(0, '{"a"') Arguments(0, ": 1}")

The parser reads letter by letter, so where the text is cut makes no difference. It writes nothing that belongs to the format
and holds back what may yet: the beginning of a marker, and white space that turns out to stand before one.
"""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from duoserve.api.thoughts import Thought

BLANK = " \n\r\t"
OUTSIDE = set('{}[]:,"+-.' + string.ascii_letters + string.digits + BLANK)  # what JSON has outside strings
NAMES = 256  # letters of a name, or of a head that contains one


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model wrote for itself."""

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


Delta = Content | Reasoning | Call | Arguments
Letters = Generator[None, str, None]  # is sent one letter at a time
Marker = Callable[[str], str]  # a marker as grammars write it: as a token, or letter by letter


class Signature(NamedTuple):
    """What a forced call may be: a function's name, its parameters as a schema, and whether all of it must hold."""

    name: str
    schema: Mapping[str, Any]
    strict: bool


@dataclass(frozen=True)
class Format(ABC):
    """How a family writes calls. `opens` begins them; where what follows is none, it is content up to `closes`.

    `markers`: what of it may be special tokens. `always`: answers without tools are written in it, too. `text_arguments`:
    the family's template joins arguments as text. `bare`: calls stand without a marker, so that what has not begun to be one
    is content, however it ends. `id_letters`: of a call's id, where the template insists on their number.
    `schemas`: parameters of the functions at hand, by name.
    """

    name: str
    opens: str
    closes: str
    markers: tuple[str, ...]
    always: bool = False
    text_arguments: bool = False
    bare: bool = False
    id_letters: int | None = None
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def new_id(self) -> str:
        if self.id_letters is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(self.id_letters))

    @abstractmethod
    def rules(self, marker: Marker, tools: Sequence[Signature], parallel: bool) -> str:
        """One call or more of these, as the model was taught to write them, in llguidance's words."""

    def answer(self, json_rule: str, marker: Marker) -> str | None:
        """The grammar of an answer that is JSON by a rule, where it does not stand alone."""
        return None

    def read(self, parser: Parser) -> Letters:
        """What follows `opens`. Malformed where it is no call; a family that reads whole answers in `text` has none."""
        raise Malformed(f"{self.name} has no call alone")

    def text(self, parser: Parser) -> Letters:
        """A whole answer."""
        while True:
            yield from parser.content_until(self.opens)
            yield from parser.attempt(self)


class Malformed(Exception):
    """What stands where a call should is none."""


class Parser:
    """Reads one answer's text: its `thought` first, where there is one. `format` None: all else is content."""

    def __init__(self, format: Format | None, thought: Thought | None = None):
        self._format = format
        self._out: list[Delta] = []
        self._pending = ""  # what may become a marker
        self._blank = ""  # white space that may stand before one
        self._inside = ""  # of a call that has not begun yet: its letters
        self._begun = self._open = False
        self._unread = ""  # letters that were read and belong to what follows
        self._thinking = self._thought = False  # inside a thought; it has letters
        self.calls = 0
        self._reader = self._answer(thought) if format is not None or thought is not None else None
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
                (self.muse if self._thinking else self.say)(letter)
        if self._open and not self._begun and self._format is not None and self._format.bare:
            self._out.append(Content(self._inside))
        if not self._open and not self._thinking and self.calls == 0:
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
            elif isinstance(delta, Reasoning) and isinstance(last, Reasoning):
                taken[-1] = Reasoning(last.text + delta.text)
            elif isinstance(delta, Arguments) and isinstance(last, Arguments) and last.index == delta.index:
                taken[-1] = Arguments(last.index, last.text + delta.text)
            else:
                taken.append(delta)
        self._out = []
        return [d for d in taken if isinstance(d, Call) or d.text]

    # What formats tell

    def say(self, letter: str) -> None:
        """A letter of the answer; white space once it is not the last."""
        if letter in BLANK:
            self._blank += letter
        else:
            self._out.append(Content(self._blank + letter))
            self._blank = ""

    def think(self, letter: str) -> None:
        self._out.append(Reasoning(letter))

    def muse(self, letter: str) -> None:
        """A letter of a thought, without the white space around it."""
        if letter in BLANK:
            self._blank += letter if self._thought else ""
        else:
            self._out.append(Reasoning(self._blank + letter))
            self._blank, self._thought = "", True

    def separate(self) -> None:
        """Another part of the answer begins."""
        self._blank = "\n\n"

    def begin(self, name: str, id: str | None = None) -> None:
        """A call by this name."""
        if not name:
            raise Malformed
        assert self._format is not None
        self._open, self._begun, self._inside, self.calls = True, True, "", self.calls + 1
        self._out.append(Call(self.calls - 1, id or self._format.new_id(), name))

    def tell(self, text: str) -> None:
        """More of the arguments of the call that has begun."""
        self._out.append(Arguments(self.calls - 1, text))

    def over(self) -> None:
        """The call is whole."""
        self._open = False

    # What formats read

    def _answer(self, thought: Thought | None) -> Letters:
        if thought is not None and (thought.begun or (yield from self._opened(thought.opens))):
            self._thinking = True
            yield from self.content_until(thought.closes, say=self.muse)
            self._thinking, self._blank = False, ""
            self.unread((yield from self.next()))
        if self._format is not None:
            yield from self._format.text(self)
        while True:
            self.say((yield from self.letter()))

    def _opened(self, marker: str) -> Generator[None, str, bool]:
        """Whether the answer begins with the marker; if not, all of it is still to be read."""
        while marker.startswith(self._pending.lstrip(BLANK)):
            if self._pending.endswith(marker):
                self._pending = ""
                return True
            self._pending += yield from self.letter()
        seen, self._pending = self._pending, ""
        self.unread(seen)
        return False

    def content_until(self, *markers: str, say: Callable[[str], None] | None = None) -> Generator[None, str, str]:
        """Everything up to one of the markers is content; returns which."""
        say = say or self.say
        while self._pending not in markers:
            self._pending += yield from self.letter()
            while not any(marker.startswith(self._pending) for marker in markers):
                say(self._pending[0])
                self._pending = self._pending[1:]
        found, self._pending = self._pending, ""
        return found

    def attempt(self, format: Format) -> Letters:
        """Calls; where there are none, content as far as nothing was told of it yet."""
        self._open, self._begun, self._blank, self._inside = True, False, "", ""
        try:
            yield from format.read(self)
        except Malformed:
            if self._begun:
                yield from self.past(format.closes or "]")
            else:
                self._unread, self._inside = self._inside, ""
                self._open, self._begun = False, True
                if format.closes:
                    yield from self.content_until(format.closes)
        self._open = False

    def another(self) -> None:
        """Another call may follow; what there is of it until it has a name is none yet."""
        self._open, self._begun, self._inside = True, False, self._unread

    def past(self, *markers: str) -> Generator[None, str, str]:
        """Leave out everything up to one of the markers; returns which."""
        seen = ""
        while True:
            seen = (seen + (yield from self.letter()))[-max(map(len, markers)) :]
            for marker in markers:
                if seen.endswith(marker):
                    return marker

    def until(self, *markers: str, most: int | None = None) -> Generator[None, str, tuple[str, str]]:
        """The text up to one of the markers, and which; Malformed where it has more than `most` letters."""
        letters: list[str] = []
        tail, width = "", max(map(len, markers))
        while True:
            letter = yield from self.letter()
            letters.append(letter)
            tail = (tail + letter)[-width:]
            for marker in markers:
                if tail.endswith(marker):
                    return "".join(letters)[: len(letters) - len(marker)], marker
            if most is not None and len(letters) > most + width:
                raise Malformed

    def letter(self) -> Generator[None, str, str]:
        if self._unread:
            letter, self._unread = self._unread[0], self._unread[1:]
            return letter
        letter = yield
        if self._open and not self._begun:
            self._inside += letter
        return letter

    def next(self) -> Generator[None, str, str]:
        """The next letter that is not white space."""
        while (letter := (yield from self.letter())) in BLANK:
            pass
        return letter

    def unread(self, letter: str) -> None:
        self._unread = letter + self._unread

    def object(self) -> Letters:
        """{"name": ..., "arguments": ...}, in any order, among others: another call."""
        self.another()
        yield from self.members()

    def members(self) -> Letters:
        """The same; where it is none, what came before it is content as well."""
        held: list[str] = []  # arguments that came before the name
        told = False

        def tell(text: str) -> None:
            if self._begun:
                self.tell(text)
            else:
                held.append(text)

        if (yield from self.next()) != "{":
            raise Malformed
        letter = yield from self.next()
        while letter != "}":
            key = yield from self.string(letter)
            if (yield from self.next()) != ":":
                raise Malformed
            letter = yield from self.next()
            if key == "name" and not self._begun:
                self.begin((yield from self.string(letter)))
                tell("".join(held))
            elif key in ("arguments", "parameters") and not told:
                told = True
                if letter == '"':  # JSON within JSON
                    tell((yield from self.string(letter)))
                else:
                    yield from self.value(letter, tell)
            else:
                yield from self.value(letter, lambda text: None)
            letter = yield from self.next()
            if letter == ",":
                letter = yield from self.next()
            elif letter != "}":
                raise Malformed
        if not self._begun:
            raise Malformed
        if not told:
            tell("{}")
        self.over()

    def string(self, letter: str) -> Generator[None, str, str]:
        if letter != '"':
            raise Malformed
        raw: list[str] = []
        yield from self.value(letter, raw.append)
        try:
            return str(json.loads("".join(raw)))
        except ValueError as error:
            raise Malformed from error

    def value(self, letter: str, tell: Callable[[str], None]) -> Letters:
        """One JSON value that begins with `letter`, as it is written."""
        if letter in ",]}:":
            raise Malformed
        depth, quoted, escaped = 0, False, False
        scalar = letter not in '{["'
        while True:
            if not quoted and letter not in OUTSIDE:
                self.unread(letter)
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
            letter = yield from self.letter()
            if scalar and (letter in BLANK or letter in ",}]"):
                self.unread(letter)
                return
