"""Requests with tools: definitions and messages checked, rendered by the model's own chat template, calls forced where the
request says so, and read out of the answer. Knows OpenAI's shapes and one tokenizer; knows nothing of engines or HTTP.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from duoserve.api.calls import Format, Parser, Signature
from duoserve.api.formats import format_of
from duoserve.api.grammar import (
    COMPILE_S,
    Mask,
    check_schema,
    json_rule,
    lark_grammar,
    marker_of,
    mask_for,
    mask_of,
)
from duoserve.api.thoughts import Thought, thought_of
from duoserve.core import Refusal
from duoserve.stopping import special_ids

MOST_TOOLS = 128
LAST_WORDS = 16  # tokens of a prompt in which a thought may have been opened or closed
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FUNCTION_FIELDS = {"name", "description", "parameters", "strict"}
ROLES = ("system", "developer", "user", "assistant", "tool")


class Tool(NamedTuple):
    """A function that the model may call. `strict`: a schema that cannot be enforced in full is refused."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool

    def definition(self) -> dict[str, Any]:
        """As templates read it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class Prepared(NamedTuple):
    """A request for the service: the prompt's ids, what may come, what reads it, special tokens that the reader must see,
    and how the model thinks before it answers.

    For several answers of one request: `mask.again()` and `parser` for each.
    """

    ids: list[int]
    mask: Mask | None
    format: Format | None
    visible: frozenset[int]
    thought: Thought | None = None

    @property
    def parser(self) -> Parser:
        """A new one."""
        return Parser(self.format, self.thought)


def prepare(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    tool_choice: Any,
    tokenizer: Any,
    ends: Sequence[int] | None = None,
    parallel: bool = True,
    within: Callable[[Callable[[], list[int]]], list[int]] = lambda render: render(),
    answer: Mapping[str, Any] | None = None,
) -> Prepared:
    """What OpenAI's `messages`, `tools`, `tool_choice`, `parallel_tool_calls` and response_format (`answer`) ask for.

    `ends` as `grammar.mask_for`; `within` calls what renders, within a bound.
    Takes as long as a schema's compiling does: keep it off the event loop.
    """
    known = check_tools(tools or [])
    chosen, must = choose(known, tool_choice)
    own = _own_format(tokenizer)
    format = _format(tokenizer) if chosen else own if own is not None and own.always else None
    clean = check_messages(messages, own is not None and own.text_arguments)
    mask = _answer_mask(answer, format, tokenizer, ends)
    if chosen and format is not None:
        if mask is not None:
            raise Refusal("E_SCHEMA", "response_format and tools are 2 forms for one answer", "say tool_choice none")
        check_parameters(known, tokenizer, ends)
        format = replace(format, schemas={tool.name: tool.parameters for tool in known})
        if must:
            mask = mask_of(forced(format, chosen, tokenizer, ends, parallel), tokenizer, ends)
    shown = [tool.definition() for tool in known] if chosen else None
    ids = within(lambda: render(clean, shown, tokenizer))
    thought = _thought(format, ids, tokenizer) if mask is None else None  # what is held to a form begins with it
    return Prepared(ids, mask, format, _visible(format, thought, tokenizer), thought)


def plain_reader(ids: Sequence[int], tokenizer: Any) -> tuple[Parser | None, frozenset[int]]:
    """What reads the answer to a prompt without tools, and the special tokens it must see; None: it is as it is written."""
    if tokenizer is None:
        return None, frozenset()
    own = _own_format(tokenizer)
    format = own if own is not None and own.always else None
    thought = _thought(format, ids, tokenizer)
    reads = format is not None or thought is not None
    return Parser(format, thought) if reads else None, _visible(format, thought, tokenizer)


def _thought(format: Format | None, ids: Sequence[int], tokenizer: Any) -> Thought | None:
    if format is not None and format.always:  # it says itself what is thought
        return None
    end = tokenizer.decode(list(ids[-LAST_WORDS:]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return thought_of("\n".join(_templates(tokenizer)), end)


def _answer_mask(answer: Any, format: Format | None, tokenizer: Any, ends: Sequence[int] | None) -> Mask | None:
    def written(rule: str) -> str | None:
        return format.answer(rule, lambda text: marker_of(text, tokenizer, ends)) if format is not None else None

    return mask_for(answer, tokenizer, ends, written)


def check_tools(tools: Sequence[Any]) -> list[Tool]:
    """Definitions within the bounds, by names of their own."""
    if not isinstance(tools, list | tuple):
        raise _wrong(f"tools is a {type(tools).__name__}", "give a list of functions")
    if len(tools) > MOST_TOOLS:
        raise _wrong(f"{len(tools)} tools, at most {MOST_TOOLS} may be", "send fewer")
    checked = [_tool(at, tool) for at, tool in enumerate(tools)]
    names = [tool.name for tool in checked]
    for name in names:
        if names.count(name) > 1:
            raise _wrong(f"{names.count(name)} tools are called {name}", "give each a name of its own")
    return checked


def _tool(at: int, tool: Any) -> Tool:
    where = f"tools[{at}]"
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        raise _wrong(f"{where} is no function", 'write {"type": "function", "function": {...}}')
    function = tool["function"]
    extra = sorted((set(tool) - {"type", "function"}) | (set(function) - FUNCTION_FIELDS), key=str)
    if extra:
        raise _wrong(f"{where} has the field {extra[0]!r:.60}", f"use {', '.join(sorted(FUNCTION_FIELDS))}")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _wrong(f"{where} is called {name!r:.80}", "use 1 to 64 letters, digits, _ and -")
    if not isinstance(description, str | None) or not isinstance(function.get("strict"), bool | None):
        raise _wrong(f"{where} has a description that is no text, or a strict that is neither", "correct the types")
    return Tool(name, description or "", _parameters(where, function.get("parameters")), bool(function.get("strict")))


def _parameters(where: str, parameters: Any) -> dict[str, Any]:
    if parameters is None:
        return {"type": "object", "properties": {}}
    try:
        schema = check_schema(parameters)
    except Refusal as refusal:
        raise _wrong(f"{where}.function.parameters: {str(refusal).partition(': ')[2]}", "correct the tool") from refusal
    if schema.setdefault("type", "object") != "object":
        raise _wrong(f"{where}.function.parameters has the type {schema['type']!r:.40}", "make it an object")
    return schema


def choose(known: Sequence[Tool], tool_choice: Any) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be."""
    if tool_choice is None:
        tool_choice = "auto" if known else "none"
    if tool_choice == "none":
        return [], False
    if tool_choice == "auto":
        return list(known), False
    if not known:
        raise _wrong("tool_choice asks for a call, and there are 0 tools", "send tools")
    if tool_choice == "required":
        return list(known), True
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function":
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        named = [tool for tool in known if tool.name == name]
        if not named:
            raise _wrong(f"tool_choice names {name!r:.80}, which is none of the {len(known)} tools", "name one of them")
        return named, True
    raise _wrong(f"tool_choice is {tool_choice!r:.80}", 'use none, auto, required or {"type": "function", ...}')


def _wrong(what: str, remedy: str) -> Refusal:
    return Refusal("E_TOOLS", what, remedy)


# The family's format


def _format(tokenizer: Any) -> Format:
    template = _template(tokenizer, tools=True)
    if not re.search(r"\btools\b", template):
        raise _wrong("this model's chat template has no place for tools", "use another model, or send no tools")
    format = format_of(template)
    if isinstance(format, str):
        raise _wrong(f"this model writes its calls in a format that is not read ({format})", "send no tools")
    return format


def _own_format(tokenizer: Any) -> Format | None:
    """What the model writes in, tools or not; None where that is not known."""
    found = [format_of(text) for text in _templates(tokenizer)]
    return next((format for format in found if isinstance(format, Format)), None)


def _templates(tokenizer: Any) -> list[str]:
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, Mapping) else [template]
    return [text for text in texts if isinstance(text, str)]


def _template(tokenizer: Any, tools: bool) -> str:
    """Some models have several templates, one of them for tools."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = (template.get("tool_use") if tools else None) or template.get("default")
    if not isinstance(template, str):
        raise Refusal("E_TEMPLATE", "the model has 0 chat templates", "use the completions endpoint")
    return template


def _visible(format: Format | None, thought: Thought | None, tokenizer: Any) -> frozenset[int]:
    """The markers of format and thought, where they are tokens that text leaves out."""
    markers = (*(format.markers if format else ()), *((thought.opens, thought.closes) if thought else ()))
    if not markers:
        return frozenset()
    ids = (tokenizer.get_added_vocab().get(marker) for marker in markers)
    return frozenset(special_ids(tokenizer).intersection(ids))


def check_parameters(known: Sequence[Tool], tokenizer: Any, ends: Sequence[int] | None = None) -> None:
    """The schemas are sound: compiled, though nothing may be forced. What cannot be enforced is refused where strict.

    All at once, so that many are not many times as slow; only to say which one is wrong is each compiled alone.
    """
    try:
        rules = [f"a{n}: {_arguments(tool)}" for n, tool in enumerate(known)]
        alternatives = " | ".join(f"a{n}" for n in range(len(known)))
        mask_of(lark_grammar("\n".join([f"start: {alternatives}", *rules])), tokenizer, ends)
    except Refusal as refusal:
        until = time.monotonic() + COMPILE_S
        for at, tool in enumerate(known):
            if time.monotonic() < until:
                _check_alone(at, tool, tokenizer, ends)
        raise refusal.under("E_TOOLS") from refusal


def _check_alone(at: int, tool: Tool, tokenizer: Any, ends: Sequence[int] | None) -> None:
    try:
        mask_of(lark_grammar(f"start: {_arguments(tool)}"), tokenizer, ends)
    except Refusal as refusal:
        why = str(refusal).partition(": ")[2]
        raise _wrong(f"tools[{at}].function.parameters: {why}", f"correct {tool.name}") from refusal


def _arguments(tool: Tool) -> str:
    return json_rule(tool.parameters, lenient=not tool.strict)


def forced(
    format: Format, tools: Sequence[Tool], tokenizer: Any, ends: Sequence[int] | None = None, parallel: bool = True
) -> str:
    """The grammar of an answer that calls one of these tools, or several."""
    signatures = [Signature(tool.name, tool.parameters, tool.strict) for tool in tools]
    return lark_grammar(format.rules(lambda text: marker_of(text, tokenizer, ends), signatures, parallel))


# Messages


def check_messages(messages: Sequence[Mapping[str, Any]], text_arguments: bool = False) -> list[dict[str, Any]]:
    """Messages as templates read them: text contents, arguments as objects or text, each result with its call's name."""
    asked: dict[str, str] = {}  # calls that wait for their result: id -> name
    clean = [_message(at, message, asked) for at, message in enumerate(messages)]
    for call in (call for message in clean if text_arguments for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return clean


def _message(at: int, message: Any, asked: dict[str, str]) -> dict[str, Any]:
    where = f"messages[{at}]"
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise _wrong(f"{where} has the role {role!r:.40}", f"use {', '.join(ROLES)}")
    clean: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls") if role == "assistant" else None
    clean["content"] = _content(where, message.get("content"), optional=bool(calls))
    if calls is not None:
        if not isinstance(calls, list | tuple) or not 0 < len(calls) <= MOST_TOOLS:
            raise _wrong(f"{where}.tool_calls is no list of 1 to {MOST_TOOLS} calls", "correct it")
        clean["tool_calls"] = [_call(f"{where}.tool_calls[{n}]", call, asked) for n, call in enumerate(calls)]
    if isinstance(message.get("name"), str) and role != "tool":
        clean["name"] = message["name"]
    if isinstance(message.get("reasoning"), str):
        clean["reasoning_content"] = message["reasoning"]
        if calls and not clean["content"]:
            clean["thinking"] = message["reasoning"]  # gpt-oss' name for it, beside calls alone
    if role == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str) or call_id not in asked:
            raise _wrong(f"{where} answers the call {call_id!r:.60}, which nobody waits for", "send the call before it")
        clean |= {"tool_call_id": call_id, "name": asked.pop(call_id)}
    return clean


def _call(where: str, call: Any, asked: dict[str, str]) -> dict[str, Any]:
    function = (
        call.get("function") if isinstance(call, Mapping) and call.get("type", "function") == "function" else None
    )
    if not isinstance(function, Mapping) or not isinstance(call.get("id"), str):
        raise _wrong(f"{where} is no call of a function", 'write {"id", "type": "function", "function"}')
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _wrong(f"{where} calls {name!r:.80}", "use 1 to 64 letters, digits, _ and -")
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise _wrong(f"{where}.function.arguments is no JSON object in a text", 'write them like "{}"')
    asked[call["id"]] = name
    return {"id": call["id"], "type": "function", "function": {"name": name, "arguments": read}}


def _content(where: str, content: Any, optional: bool) -> str:
    """A text, or parts that are texts; none where a call stands for it."""
    if content is None and optional:
        return ""
    if isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _wrong(f"{where}.content is no text", "only texts are read")
    return content.encode(errors="replace").decode()


def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, tokenizer: Any) -> list[int]:
    """The prompt's ids, by the model's own template."""
    template = _template(tokenizer, tools=bool(tools))
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=template, add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # templates are programs of their authors
        raise Refusal(
            "E_TEMPLATE", f"the chat template refused {len(messages)} messages ({error})", "check the roles"
        ) from error
    ids: list[int] = encoded["input_ids"]
    return ids
