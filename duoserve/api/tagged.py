"""Calls that write each argument between tags, its value as it is: text without quotes, all else as JSON. Which of the two a
value is follows from the function's parameters. Knows tags and schemas; knows no tokens, requests or models.

    <tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>   ->   f  {"city": "Rome"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duoserve.api.calls import NAMES, Format, Letters, Malformed, Marker, Parser, Signature
from duoserve.api.grammar import json_rule
from duoserve.core import Refusal

PYTHON = {"True": "true", "False": "false", "None": "null"}  # what some templates make of JSON's words
REFERENCES = 32  # that lead from one to another


def quoted(text: str) -> str:
    """As grammars write text."""
    return json.dumps(text, ensure_ascii=False)


def alternatives(tools: Sequence[Signature]) -> str:
    return " | ".join(f"f{n}" for n in range(len(tools)))


@dataclass(frozen=True)
class Tagged(Format):
    """`call` NAME `name_end`, for each argument `key` NAME `key_end` `value` VALUE `value_end`, then `call_end`; one, or
    `several` of them, within `opens` and `closes`.

    `gap` is written between the tags, `pad` around a value: one line end, which is none of it.
    """

    call: str = ""
    name_end: str = ""
    key: str = ""
    key_end: str = ""
    value: str = ""
    value_end: str = ""
    call_end: str = ""
    several: bool = False
    gap: str = "\n"
    pad: str = ""

    # Forced

    def rules(self, marker: Marker, tools: Sequence[Signature], parallel: bool) -> str:
        gap = quoted(self.gap) if self.gap else ""
        begin = f"{gap} {quoted(self.call)}" if self.call else ""
        end = marker(self.call_end) + (f" {gap} {marker(self.closes)}" if self.call and not self.several else "")
        lines = [f"one: {begin} ({alternatives(tools)}) {end}"]
        for n, tool in enumerate(tools):
            lines += self._function(f"f{n}", tool, marker, gap)
        if self.several:
            more = "one*" if parallel else ""
            start = f"start: {marker(self.opens)} one {more} {gap} {marker(self.closes)}"
        else:
            more = f"({gap} {marker(self.opens)} one)*" if parallel else ""
            start = f"start: {marker(self.opens)} one {more}"
        return "\n".join([start, *lines])

    def _function(self, rule: str, tool: Signature, marker: Marker, gap: str) -> Iterator[str]:
        """Its known parameters in their order, those that must be and those that may."""
        known, must = tool.schema.get("properties") or {}, tool.schema.get("required") or ()
        parts = [quoted(tool.name) + (f" {quoted(self.name_end)}" if self.name_end else "") + f" {gap}"]
        for n, (name, schema) in enumerate(known.items()):
            pad = quoted(self.pad) if self.pad else ""
            key, between = f"{marker(self.key)} {quoted(name)} {marker(self.key_end)}", ""
            if self.value:
                between = f"{gap} {marker(self.value)}"
            one = f"{key} {between} {pad} {rule}v{n} {pad} {marker(self.value_end)} {gap}"
            parts.append(one if name in must else f"({one})?")
            yield f"{rule}v{n}: {_value_rule(tool, name, schema)}"
        yield f"{rule}: {' '.join(parts)}"

    # Read

    def read(self, parser: Parser) -> Letters:
        before = parser.calls
        while True:
            if self.call and (yield from parser.past(self.call, self.closes)) == self.closes:
                if parser.calls == before:
                    raise Malformed
                return
            yield from self._call(parser)
            if self.several:
                continue
            if self.call_end == self.closes or (yield from parser.past(self.closes, self.opens)) == self.closes:
                return  # else its end was forgotten

    def _call(self, parser: Parser) -> Letters:
        parser.another()
        if self.name_end:
            name, _ = yield from parser.until(self.name_end, most=NAMES)
            follows = ""
        else:
            name, follows = yield from parser.until(self.key, self.call_end, most=NAMES)
        name = name.strip()
        if not name or any(letter.isspace() or letter in "<>{}" for letter in name):
            raise Malformed
        parser.begin(name)
        parser.tell("{")
        schema, first = self.schemas.get(name, {}), True
        while (follows or (yield from parser.past(self.key, self.call_end))) != self.call_end:
            follows = ""
            key, _ = yield from parser.until(self.key_end)
            if self.value:
                yield from parser.past(self.value)
            text, _ = yield from parser.until(self.value_end)
            parser.tell(("" if first else ", ") + f"{quoted(key.strip())}: {self._json(text, schema, key.strip())}")
            first = False
        parser.tell("}")
        parser.over()

    def _json(self, text: str, schema: Mapping[str, Any], key: str) -> str:
        if self.pad:
            text = text.removeprefix(self.pad).removesuffix(self.pad)
        return json_of(text, kinds((schema.get("properties") or {}).get(key), schema))


def json_of(text: str, kinds: set[str] | None) -> str:
    """What stood between tags as JSON: text where the schema wants text, or where it is nothing else. `kinds`: None where
    nothing is known."""
    word = PYTHON.get(text.strip(), text)
    try:
        value = json.loads(word, parse_constant=_none)
    except (ValueError, RecursionError):
        return quoted(text)
    if isinstance(value, str) or (kinds is not None and not kinds & _kinds_of(value)):
        return quoted(text)
    return word.strip()


def _none(name: str) -> Any:
    raise ValueError(name)


def _kinds_of(value: Any) -> set[str]:
    """JSON Schema's types of a value."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    names: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return {names.get(type(value), "null")}


def kinds(schema: Any, root: Mapping[str, Any]) -> set[str] | None:
    """The types that a schema allows, as far as it says so."""
    schema = _resolved(schema, root)
    if not isinstance(schema, Mapping):
        return None
    if "type" in schema:
        named = schema["type"]
        found = set(named) if isinstance(named, list) else {named}
        return found | {"integer"} if "number" in found else found
    if "const" in schema or "enum" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return set().union(*(_kinds_of(value) for value in values))
    for several in ("anyOf", "oneOf"):
        if isinstance(schema.get(several), list):
            each = [kinds(one, root) for one in schema[several]]
            return None if None in each else set().union(*(one for one in each if one is not None))
    return None


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    for _ in range(REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        found: Any = root
        for step in schema["$ref"].removeprefix("#").strip("/").split("/"):
            found = found.get(step) if step and isinstance(found, Mapping) else found
        schema = found
    return None


def _value_rule(tool: Signature, name: str, schema: Any) -> str:
    """What may stand between the tags of one argument."""
    known = kinds(schema, tool.schema)
    if known is not None and "string" not in known:
        whole = {word: tool.schema[word] for word in ("$defs", "definitions") if word in tool.schema}
        return json_rule({**whole, **schema}, lenient=not tool.strict)
    found = _resolved(schema, tool.schema)
    found = found if isinstance(found, Mapping) else {}
    words = found.get("enum", [found["const"]] if "const" in found else None)
    if words is not None and all(isinstance(word, str) for word in words):
        return " | ".join(quoted(word) for word in words)
    loose = [word for word in ("pattern", "format") if word in found] or known != {"string"}
    if tool.strict and loose:
        what = f"the parameter {name!r:.60} of {tool.name} is text that this model's calls cannot be held to"
        raise Refusal("E_TOOLS", what, "leave out strict, pattern, format and mixed types")
    least, most = found.get("minLength", 0), found.get("maxLength", "")
    return f"/[^<]{{{least},{most}}}/" if least or most != "" else "/[^<]*/"


GLM = Tagged(
    "glm-4.5", "<tool_call>", "</tool_call>",
    ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    key="<arg_key>", key_end="</arg_key>", value="<arg_value>", value_end="</arg_value>", call_end="</tool_call>",
)  # fmt: skip
QWEN_CODER = Tagged(
    "qwen3-coder", "<tool_call>", "</tool_call>", ("<tool_call>", "</tool_call>"),
    call="<function=", name_end=">", key="<parameter=", key_end=">", value_end="</parameter>", call_end="</function>",
    pad="\n",
)  # fmt: skip
MINIMAX = Tagged(
    "minimax-m2", "<minimax:tool_call>", "</minimax:tool_call>", ("<minimax:tool_call>", "</minimax:tool_call>"),
    call='<invoke name="', name_end='">', key='<parameter name="', key_end='">', value_end="</parameter>",
    call_end="</invoke>", several=True,
)  # fmt: skip
