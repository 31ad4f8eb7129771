"""How families write tool calls: found by the words of the model's own chat template, each with the grammar that forces
calls and with the reading of them. Knows families; knows no requests or models (`calls.py` has the letters).

    Objects   Hermes, Qwen3, Mixtral, Granite             the name and the arguments in one JSON object
    Bare      Llama 3.1 to 4                              the same, with nothing around it: an answer is a call or is none
    Named     DeepSeek V3 and V3.1, Kimi K2, Mistral      a name between markers, then the arguments as JSON
    Tagged    GLM-4.5, Qwen3-Coder, MiniMax M2            a tag per argument, its text as it is (`tagged.py`)
    Harmony   gpt-oss                                     messages in channels, one of them for calls
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from duoserve.api.calls import BLANK, NAMES, Format, Letters, Malformed, Marker, Parser, Signature
from duoserve.api.grammar import json_rule
from duoserve.api.tagged import GLM, MINIMAX, QWEN_CODER, alternatives, quoted


def _arguments(tools: Sequence[Signature]) -> list[str]:
    """A rule for each function's arguments as JSON."""
    return [f"a{n}: {json_rule(tool.schema, lenient=not tool.strict)}" for n, tool in enumerate(tools)]


@dataclass(frozen=True)
class Objects(Format):
    """{"name": ..., "arguments": ...}: each between markers, or all in one list behind a marker."""

    listed: bool = False

    def rules(self, marker: Marker, tools: Sequence[Signature], parallel: bool) -> str:
        lines = [f"body: {alternatives(tools)}", *_arguments(tools)]
        for n, tool in enumerate(tools):
            head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
            lines.append(f'f{n}: {head} a{n} "}}"')
        opens = marker(self.opens)
        if self.listed:
            more = '(", " body)*' if parallel else ""
            return "\n".join([f'start: {opens} /[ ]?/ "[" body {more} "]"', *lines])
        more = '("\\n" call)*' if parallel else ""
        return "\n".join([f"start: call {more}", f'call: {opens} "\\n" body "\\n" {marker(self.closes)}', *lines])

    def read(self, parser: Parser) -> Letters:
        if not self.listed:
            again = True
            while again:  # its end may be forgotten
                yield from parser.object()
                again = (yield from parser.past(self.closes, self.opens)) == self.opens
            return
        if (yield from parser.next()) != "[":
            raise Malformed
        letter = ","
        while letter != "]":
            if letter != ",":
                raise Malformed
            yield from parser.object()
            letter = yield from parser.next()


@dataclass(frozen=True)
class Bare(Format):
    """{"name": ..., "parameters": ...}, at the beginning of an answer or behind `opens`; more of them follow, or ;."""

    def rules(self, marker: Marker, tools: Sequence[Signature], parallel: bool) -> str:
        lines = [f"body: {alternatives(tools)}", *_arguments(tools)]
        for n, tool in enumerate(tools):
            head = json.dumps(f'{{"name": "{tool.name}", "parameters": ')
            lines.append(f'f{n}: {head} a{n} "}}"')
        return "\n".join([f"start: body{'+' if parallel else ''}", *lines])

    def text(self, parser: Parser) -> Letters:
        while True:
            yield from parser.attempt(self)
            yield from parser.content_until(self.opens)

    def read(self, parser: Parser) -> Letters:
        letter = yield from parser.next()
        if letter == "<":  # the marker itself
            for expected in self.opens[1:]:
                if (yield from parser.letter()) != expected:
                    raise Malformed
            letter = yield from parser.next()
        parser.unread(letter)
        if letter != "{":
            raise Malformed
        yield from parser.members()
        while (letter := (yield from parser.next())) in ";{":
            if letter == "{":
                parser.unread(letter)
                yield from parser.object()
        parser.unread(letter)


@dataclass(frozen=True)
class Named(Format):
    """A name, `middle`, its arguments as JSON; each between `call` and `ends`, all of them between `opens` and `closes`.
    Where a call has no beginning of its own, each stands behind `opens`.

    `call` and `ends` are the pieces that they are written in. `fence`: what stands before the JSON besides. `numbered`: the
    name comes as functions.NAME:0, which is the call's id.
    """

    call: tuple[str, ...] = ()
    middle: str = ""
    fence: str = ""
    ends: tuple[str, ...] = ()
    between: str = ""
    numbered: bool = False

    def rules(self, marker: Marker, tools: Sequence[Signature], parallel: bool) -> str:
        call, ends = (" ".join(map(marker, pieces)) for pieces in (self.call, self.ends))
        fence = quoted(self.fence) if self.fence else ""
        lines = [f"one: {call} ({alternatives(tools)}) {ends}", *_arguments(tools)]
        for n, tool in enumerate(tools):
            name = f'"functions.{tool.name}:" /[0-9]/' if self.numbered else quoted(tool.name)
            lines.append(f"f{n}: {name} {marker(self.middle)} {fence} a{n}")
        opens, between = marker(self.opens), quoted(self.between) if self.between else ""
        more = f"({between if self.call else opens} one)*" if parallel else ""
        return "\n".join([f"start: {opens} one {more} {marker(self.closes) if self.closes else ''}", *lines])

    def read(self, parser: Parser) -> Letters:
        call, before = "".join(self.call), parser.calls
        while True:
            if call and (yield from parser.past(call, self.closes)) == self.closes:
                if parser.calls == before:
                    raise Malformed
                return
            parser.another()
            head, _ = yield from parser.until(self.middle, most=NAMES)
            yield from self._call(parser, head.strip())
            if self.ends:
                yield from parser.past(self.ends[-1])
            if not call:
                return

    def _call(self, parser: Parser, head: str) -> Letters:
        name = head.partition("[CALL_ID]")[0]  # some of Mistral's write an id of their own
        if self.numbered:
            name = head.removeprefix("functions.").rpartition(":")[0] or head
        if any(letter in BLANK for letter in name):
            raise Malformed
        if self.fence:
            yield from parser.until("{", most=NAMES)
        elif (yield from parser.next()) != "{":
            raise Malformed
        parser.begin(name, head if self.numbered else None)
        yield from parser.value("{", parser.tell)
        parser.over()


HEADS = ("<|channel|>", "<|message|>", "<|start|>", " to=functions.")  # what a header begins with
ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<|start|>")  # what ends a message's text


@dataclass(frozen=True)
class Harmony(Format):
    """Messages: <|channel|>CHANNEL to=RECIPIENT<|message|>TEXT<|end|><|start|>assistant<|channel|>... The prompt ends behind
    <|start|>assistant. What is in the channel `analysis`, or goes to tools that nobody offered, is reasoning; `final`, and
    commentary to nobody, is the answer; what goes to functions.NAME is a call, after which the model stops. Text without any
    header is the answer as well.
    """

    def rules(self, marker: Marker, tools: Sequence[Signature], parallel: bool) -> str:
        channel, constrain, message = map(marker, ("<|channel|>", "<|constrain|>", "<|message|>"))
        lines = [f"start: thought? ({alternatives(tools)})", self._thought(marker), *_arguments(tools)]
        for n, tool in enumerate(tools):
            to = quoted(f"commentary to=functions.{tool.name} ")
            lines.append(f'f{n}: {channel} {to} {constrain} "json" {message} a{n}')
        return "\n".join(lines)

    def answer(self, rule: str, marker: Marker) -> str:
        start = f'start: thought? {marker("<|channel|>")} "final" {marker("<|message|>")} answer'
        return "\n".join([start, self._thought(marker), f"answer: {rule}"])

    def _thought(self, marker: Marker) -> str:
        channel, message, end, start = map(marker, ("<|channel|>", "<|message|>", "<|end|>", "<|start|>"))
        return f'thought: {channel} "analysis" {message} /[^<]*/ {end} {start} "assistant"'

    def text(self, parser: Parser) -> Letters:
        said, found = False, (yield from parser.content_until(*HEADS))
        while True:
            to, channel = _header("" if found == "<|message|>" else found + (yield from self._head(parser)))
            if to.startswith("functions.") and self.schemas:
                yield from self._call(parser, to.removeprefix("functions."))
                found = yield from parser.past(*ENDS)
            elif channel == "analysis" or to:
                found = yield from parser.content_until(*ENDS, say=parser.think)
            else:
                if said:
                    parser.separate()
                said, found = True, (yield from parser.content_until(*ENDS))

    def _head(self, parser: Parser) -> Generator[None, str, str]:
        head, _ = yield from parser.until("<|message|>")
        return head

    def _call(self, parser: Parser, name: str) -> Letters:
        parser.another()
        letter = yield from parser.next()
        parser.begin(name)
        try:
            yield from parser.value(letter, parser.tell)
        except Malformed:  # it stays open: no whole call
            return
        parser.over()


def _header(head: str) -> tuple[str, str]:
    """To whom a message goes, and in which channel."""
    to, channel = re.search(r"\bto=([\w.\-]+)", head), re.search(r"<\|channel\|>(\w+)", head)
    return to[1] if to else "", channel[1] if channel else ""


HERMES = Objects("hermes", "<tool_call>", "</tool_call>", ("<tool_call>", "</tool_call>"))
MIXTRAL = Objects("mistral", "[TOOL_CALLS]", "", ("[TOOL_CALLS]",), listed=True, id_letters=9)
GRANITE = Objects("granite", "<|tool_call|>", "", ("<|tool_call|>",), listed=True)
LLAMA = Bare("llama", "<|python_tag|>", "", ("<|python_tag|>",), bare=True)
MISTRAL = Named(
    "mistral's [ARGS]", "[TOOL_CALLS]", "", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), middle="[ARGS]", id_letters=9
)
BAR = "\N{FULLWIDTH VERTICAL LINE}"  # DeepSeek's
_DEEPSEEK_WORDS = ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
_DEEPSEEK = tuple(f"<{BAR}tool▁{word}{BAR}>" for word in _DEEPSEEK_WORDS)
_CALLS, _CALL, _SEP, _CALL_END, _CALLS_END = _DEEPSEEK
DEEPSEEK_V3 = Named(
    "deepseek-v3", _CALLS, _CALLS_END, _DEEPSEEK, text_arguments=True, call=(_CALL, "function", _SEP), middle="\n",
    fence="```json\n", ends=("\n```", _CALL_END), between="\n",
)  # fmt: skip
DEEPSEEK = Named(
    "deepseek-v3.1", _CALLS, _CALLS_END, _DEEPSEEK, text_arguments=True, call=(_CALL,), middle=_SEP, ends=(_CALL_END,)
)
_KIMI_WORDS = ("calls_section_begin", "call_begin", "call_argument_begin", "call_end", "calls_section_end")
_KIMI = tuple(f"<|tool_{word}|>" for word in _KIMI_WORDS)
KIMI = Named("kimi-k2", _KIMI[0], _KIMI[4], _KIMI, call=(_KIMI[1],), middle=_KIMI[2], ends=(_KIMI[3],), numbered=True)
HARMONY = Harmony(
    "harmony", "", "", ("<|channel|>", "<|constrain|>", "<|message|>", "<|start|>", "<|end|>"), always=True
)

# What of a template betrays a format, in the order to look for it, since some contain others' words; a name alone: not read.
SIGNS: list[tuple[str, Format | str]] = [
    ("<arg_key>", GLM),
    ("<|DSML|", "DeepSeek's DSML"),
    (f"{BAR}DSML{BAR}", "DeepSeek's DSML"),
    ("<minimax:tool_call>", MINIMAX),
    ("<parameter=", QWEN_CODER),
    ("<function=", "functions as XML"),
    ("[ARGS]", MISTRAL),
    ("<|channel|>", HARMONY),
    ("```json", DEEPSEEK_V3),
    (_CALLS, DEEPSEEK),
    (_KIMI[0], KIMI),
    ("<|python_", LLAMA),
    ("<|action_start|>", "InternLM's"),
    ("functools[", "Phi's"),
    ("<|tool_call|>", GRANITE),
    (HERMES.opens, HERMES),
    (MIXTRAL.opens, MIXTRAL),
]


ARGUMENTS_AS_JSON = re.compile(r"arguments['\"\]]*\s*\|\s*tojson")  # a template that turns objects into text itself


def format_of(template: str) -> Format | str:
    """The format that a template writes former calls in; the name of one that is not read, or "unknown"."""
    found = next((format for sign, format in SIGNS if sign in template and _sure(format, template)), "unknown")
    if found is GLM and "</arg_key><arg_value>" in template:
        return replace(GLM, gap="")
    if isinstance(found, Format) and found.text_arguments and ARGUMENTS_AS_JSON.search(template):
        return replace(found, text_arguments=False)
    return found


def _sure(format: Format | str, template: str) -> bool:
    """A fence alone is no sign."""
    return format is not DEEPSEEK_V3 or _CALLS in template
