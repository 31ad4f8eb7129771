"""Calls: forced ones parse and validate, read ones lose nothing however the text is cut; what cannot be is refused."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from test_service import Reader

import duoserve
from duoserve.api import tools as tools_module
from duoserve.api.calls import Arguments, Call, Content, Delta, Format, Parser
from duoserve.api.formats import HERMES
from duoserve.api.formats import MIXTRAL as MISTRAL
from duoserve.api.tools import prepare
from duoserve.core import Refusal
from duoserve.sampling import Draw, Sampling
from duoserve.service import Request, Service
from duoserve.stopping import TextStream

HERMES_TEMPLATE = """
{%- if tools %}
{{- '<|system|>\\n' }}{% if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- "You may call functions within <tools></tools>:\\n<tools>" }}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools>\\nFor each call return JSON within <tool_call></tool_call>:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>\\n" }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<|user|>\\n<tool_response>\\n' + message.content + '\\n</tool_response>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|assistant|>\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|endoftext|>' }}
{%- elif not (tools and loop.first and message.role == 'system') %}{{- '<|' + message.role + '|>\\n' + message.content + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""  # noqa: E501
MISTRAL_TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.last %}{{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}{%- endif %}
{{- "[INST] " + message.content + "[/INST]" }}
{%- elif message.tool_calls %}{{- "[TOOL_CALLS] [" }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ", " if not loop.last }}
{%- endfor %}{{- "]" + eos_token }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- message.content + eos_token }}{%- endif %}
{%- endfor %}
"""  # noqa: E501

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
NODE = {
    "$defs": {"kind": {"enum": ["leaf", "node"]}},
    "type": "object",
    "properties": {"kind": {"$ref": "#/$defs/kind"}, "on": {"type": "boolean"}},
    "required": ["kind", "on"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "add-node": NODE}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
QUESTION = [{"role": "user", "content": "Go on"}]


@pytest.fixture(scope="module")
def plain() -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(Path(duoserve.__file__).parent / "demo"))


WARDROBE: dict[tuple[tuple[str, ...], bool], Any] = {}  # making one, and its grammars, takes longer than a test


def dressed(tokenizer: Any, template: Any, *tokens: str, special: bool = False) -> Any:
    """A tokenizer with another template, and markers as tokens; the last template asked for stays."""
    key = tokens, special
    if key not in WARDROBE:
        WARDROBE[key] = copy.deepcopy(tokenizer)
        WARDROBE[key].add_tokens(list(tokens), special_tokens=special)
    WARDROBE[key].chat_template = template
    return WARDROBE[key]


FAMILIES = {
    "hermes, letter by letter": (HERMES_TEMPLATE, (), False),
    "hermes, markers as tokens": (HERMES_TEMPLATE, ("<tool_call>", "</tool_call>"), False),
    "hermes, markers as special tokens": (HERMES_TEMPLATE, ("<tool_call>", "</tool_call>"), True),
    "mistral, letter by letter": (MISTRAL_TEMPLATE, (), False),
    "mistral, its marker a special token": (MISTRAL_TEMPLATE, ("[TOOL_CALLS]",), True),
}


def joined(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and (name, arguments) of the calls; each delta where OpenAI has it: a call before its arguments."""
    content, calls = "", []
    for delta in deltas:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, Call):
            assert delta.index == len(calls) and delta.name
            calls.append((delta.name, ""))
        else:
            assert delta.index == len(calls) - 1 and delta.text
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return content, calls


def rolled(
    prepared: Any, tokenizer: Any, seed: int, most: int = 160, calls: bool = True
) -> tuple[list[Delta], str, bool]:
    """What dice write under the mask: the deltas, the text, whether it ended."""
    dull = {token: -9.0 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}
    draw, ids = Draw(Sampling(seed=seed, bias=dull), 2, prepared.mask.again()), [7, 8]
    text, parser = TextStream(tokenizer, visible=prepared.visible), prepared.parser
    noise = torch.Generator().manual_seed(seed)
    deltas: list[Delta] = []
    for _ in range(most):
        scores = torch.randn((1, len(tokenizer) + 50), generator=noise)
        ids.append(int(draw(torch.tensor([ids]), scores).argmax()))  # type: ignore[arg-type]
        if ids[-1] == tokenizer.eos_token_id:
            break
        deltas += parser.put(text.put(ids[-1]))
    ended = ids[-1] == tokenizer.eos_token_id
    finish = "stop" if ended else "length"
    deltas += parser.put(text.end()) + parser.end(finish)
    assert parser.finish(finish) == (("tool_calls" if calls else "stop") if ended else "length")
    return deltas, text.text, ended


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add-node"}}])
def test_forced_calls_parse_and_validate(plain: Any, family: str, choice: Any) -> None:
    template, tokens, special = FAMILIES[family]
    tokenizer = dressed(plain, template, *tokens, special=special)
    prepared, ends = prepare(QUESTION, TOOLS, choice, tokenizer), 0
    for seed in range(4):
        deltas, text, ended = rolled(prepared, tokenizer, seed)
        content, calls = joined(deltas)
        assert content == "" and calls and text.startswith(("<tool_call>\n", "[TOOL_CALLS]"))
        for name, arguments in calls if ended else calls[:-1]:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
            assert choice == "required" or name == "add-node"
        ends += ended
    assert ends >= 1


def test_without_parallel_calls_there_is_one(plain: Any) -> None:
    for template in (HERMES_TEMPLATE, MISTRAL_TEMPLATE):
        tokenizer = dressed(plain, template)
        prepared = prepare(QUESTION, TOOLS, "required", tokenizer, parallel=False)
        assert all(len(joined(rolled(prepared, tokenizer, seed)[0])[1]) == 1 for seed in range(3))


def test_a_real_generation_calls_what_it_must() -> None:
    with duoserve.load(None, predictor="none", sequences=2) as engine:
        engine.tokenizer.chat_template = HERMES_TEMPLATE
        prepared = prepare(QUESTION, TOOLS[:1], "required", engine.tokenizer, parallel=False)
        service = Service(engine)
        sampling = Sampling(temperature=5.0, seed=3)
        request = Request(prepared.ids, 60, sampling, mask=prepared.mask, visible=prepared.visible)
        reader = Reader(service, request)
        end = reader.end()
        parser = prepared.parser
        deltas = [d for e in reader.seen if hasattr(e, "text") for d in parser.put(e.text)] + parser.end()
        service.close()
    content, [(name, arguments)] = joined(deltas)
    assert (content, name, parser.finish(end.finish)) == ("", "get_weather", "tool_calls")
    jsonschema.validate(json.loads(arguments), WEATHER)


# Reading


def written(format: Format, dice: random.Random) -> tuple[str, str, list[tuple[str, str]]]:
    """A text with calls, and what must be read out of it."""
    nasty = ["</tool_call>", "<tool_call>", "[TOOL_CALLS] [", '"', "\\", "}", "]", "{", "é", "🙂", "\n", "<", "a", " "]
    value: Any = lambda: dice.choice(  # noqa: E731
        [
            "".join(dice.choices(nasty, k=dice.randrange(5))),
            dice.randrange(-9, 99),
            1.5e-7,
            True,
            None,
            [],
            {},
            [{"x": [1, "]"]}],
        ]
    )
    calls = []
    for _ in range(dice.randrange(4)):
        arguments = {"".join(dice.choices(nasty, k=2)): value() for _ in range(dice.randrange(4))}
        spaced = json.dumps(arguments, indent=dice.choice([None, None, 2]), ensure_ascii=dice.random() < 0.5)
        calls.append((dice.choice(["f", "get_weather", "a-b"]), spaced))
    objects = [
        dice.choice(['{{"name": "{}", "arguments": {}}}', '{{ "arguments":{1},"name" :"{0}", "id": "abc" }}']).format(
            *call
        )
        for call in calls
    ]
    before = dice.choice(["", "Let me look.", "a < b\n<tool", "[TOOL", "[1] <|x|> {}", "  indented"])
    after = dice.choice(["", "", " And so on.", "<tool_cal", "[TOOL_CALL"])
    if format is HERMES:
        middle = "".join(f"\n<tool_call>\n{o}\n</tool_call>" for o in objects)
    else:
        middle = f"[TOOL_CALLS]{dice.choice(['', ' '])}[{', '.join(objects)}]" if objects else ""
    return before + middle + after, before + after, calls


@pytest.mark.parametrize("format", [HERMES, MISTRAL], ids=lambda f: f.name)
def test_wherever_the_text_is_cut_the_same_is_read(format: Format) -> None:
    dice = random.Random(20260714)
    for case in range(5000):
        text, content, calls = written(format, dice)
        parser, at, deltas = Parser(format), 0, []
        while at < len(text):
            to = at + dice.choice([1, 1, 2, 3, 7, 30, 1000])
            deltas += parser.put(text[at:to])
            at = to
        deltas += parser.end()
        assert joined(deltas) == (content, calls), (case, text)
        assert parser.finish("stop") == ("tool_calls" if calls else "stop")
        ids = [d.id for d in deltas if isinstance(d, Call)]
        assert len(set(ids)) == len(ids) and all(len(i) == 9 and i.isalnum() for i in ids if format is MISTRAL)


@pytest.mark.parametrize("format", [HERMES, MISTRAL], ids=lambda f: f.name)
def test_a_call_cut_short_is_what_there_is_of_it(format: Format) -> None:
    dice = random.Random(5)
    for _ in range(300):
        text, content, calls = written(format, dice)
        parser = Parser(format)
        cut = dice.randrange(len(text) + 1)
        said, begun = joined(parser.put(text[:cut]) + parser.end("length"))
        assert content.startswith(said.rstrip()), (text[:cut], said)
        assert parser.finish("length") == "length"
        assert len(begun) <= len(calls) and begun[:-1] == calls[: len(begun) - 1 if begun else 0]
        if begun:
            name, arguments = begun[-1]
            assert name == calls[len(begun) - 1][0] and calls[len(begun) - 1][1].startswith(arguments)


def test_arguments_are_told_while_they_are_written() -> None:
    parser = Parser(HERMES)
    assert parser.put('Well. \n<tool_call>{"name": "f') == [Content("Well.")]
    [call] = parser.put('", ')
    assert isinstance(call, Call) and (call.index, call.name) == (0, "f")
    assert parser.put('"arguments": {"a"') == [Arguments(0, '{"a"')]
    assert parser.put(": 1}") == [Arguments(0, ": 1}")]
    assert parser.put("}\n</tool_call>") == []


def test_what_is_no_call_is_content_without_its_markers() -> None:
    for format, text, content, calls in (
        (HERMES, "a<tool_call>no JSON</tool_call> b", "ano JSON b", []),
        (HERMES, "<tool_call>{<}</tool_call>", "{<}", []),
        (HERMES, '<tool_call>{"x": 1}</tool_call>.', '{"x": 1}.', []),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a"</tool_call> b', " b", [("f", '{"a"')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g"}', "", [("f", "{}"), ("g", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        (MISTRAL, "[TOOL_CALLS] none today", " none today", []),
    ):
        parser = Parser(format)
        assert joined(parser.put(text) + parser.end()) == (content, calls), text


def test_without_tools_every_letter_is_content() -> None:
    parser = Parser(None)
    text = "<tool_call> [TOOL_CALLS] \n"
    assert joined(parser.put(text) + parser.end()) == (text, []) and parser.finish("stop") == "stop"


# Prompts


def test_templates_get_definitions_calls_and_results(plain: Any) -> None:
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Rain"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "dry"},
    ]
    hermes = prepare(messages, TOOLS, "auto", dressed(plain, HERMES_TEMPLATE))
    text = plain.decode(hermes.ids)
    assert hermes.mask is None and text.count("Be brief.") == 1 and "Rain?" in text
    assert '"name": "get_weather"' in text and '"enum": ["Rome", "Oslo"]' in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert "<tool_response>\ndry\n</tool_response>" in text
    mistral = dressed(plain, MISTRAL_TEMPLATE, "[TOOL_CALLS]", special=True)
    prepared = prepare(messages[1:], TOOLS, None, mistral)
    assert prepared.visible == {len(plain)}
    assert '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "abcdefgh1"}]' in mistral.decode(
        prepared.ids
    )


def test_with_none_no_tool_is_shown_or_read(plain: Any) -> None:
    prepared = prepare(QUESTION, TOOLS, "none", plain)  # a template without tools will do
    assert "get_weather" not in plain.decode(prepared.ids)
    assert prepared.parser.put("<tool_call>") == [Content("<tool_call>")]


def test_a_marker_among_special_tokens_is_seen_and_others_are_not(plain: Any) -> None:
    tokenizer = dressed(plain, MISTRAL_TEMPLATE, "[TOOL_CALLS]", special=True)
    ids = [*tokenizer("[TOOL_CALLS] [x]")["input_ids"], 2]
    for visible, text in ((frozenset({len(plain)}), "[TOOL_CALLS] [x]"), (frozenset(), " [x]")):
        stream = TextStream(tokenizer, visible=visible)
        assert "".join(map(stream.put, ids)) + stream.end() == text


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


ASSISTANT = {"role": "assistant", "content": None}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many": ({"tools": [function(name=f"f{n}") for n in range(129)]}, "129 tools, at most 128 may be"),
    "no list": ({"tools": {"a": 1}}, "tools is a dict"),
    "no function": ({"tools": [{"type": "custom", "custom": {}}]}, r"tools\[0\] is no function"),
    "a number": ({"tools": [7]}, r"tools\[0\] is no function"),
    "field": ({"tools": [function(returns={})]}, "has the field 'returns'"),
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "is called None"),
    "name": ({"tools": [function(name="a b")]}, "is called 'a b'"),
    "long name": ({"tools": [function(name="a" * 65)]}, "1 to 64 letters"),
    "line end in a name": ({"tools": [function(name="a\n")]}, "is called"),
    "twice": ({"tools": [function(), function()]}, "2 tools are called f"),
    "description": ({"tools": [function(description=5)]}, "a description that is no text"),
    "parameters": ({"tools": [function(parameters=[])]}, r"tools\[0\].function.parameters: the schema is a list"),
    "array": ({"tools": [function(parameters={"type": "array"})]}, "has the type 'array'"),
    "wrong type": ({"tools": [function(parameters={"properties": {"a": {"type": "strin"}}})]}, "Invalid type: strin"),
    "strict": (
        {"tools": [function(strict=True, parameters={"properties": {"a": {"not": {}}}})]},
        'Unimplemented keys: \\["not"\\]',
    ),
    "outside": ({"tools": [function(parameters={"$ref": "http://a"})]}, "outside itself"),
    "choice": ({"tool_choice": "any"}, "tool_choice is 'any'"),
    "choice without tools": ({"tools": [], "tool_choice": "required"}, "there are 0 tools"),
    "choice of none of them": (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        "names 'g', which is none of the 2 tools",
    ),
    "half a choice": ({"tool_choice": {"type": "function"}}, "names None"),
    "role": ({"messages": [{"role": "function", "content": ""}]}, "has the role 'function'"),
    "no message": ({"messages": ["hello"]}, "has the role None"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only texts are read"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "content is no text"),
    "no calls": ({"messages": [ASSISTANT | {"content": "", "tool_calls": []}]}, "no list of 1 to 128"),
    "arguments": (
        {"messages": [ASSISTANT | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1"}}]}]},
        "no JSON object in a text",
    ),
    "called name": (
        {"messages": [ASSISTANT | {"tool_calls": [CALL | {"function": {"name": "", "arguments": "{}"}}]}]},
        "calls ''",
    ),
    "no id": ({"messages": [ASSISTANT | {"tool_calls": [CALL | {"id": 5}]}]}, "no call of a function"),
    "result of nothing": ({"messages": [{"role": "tool", "tool_call_id": "9", "content": ""}]}, "nobody waits for"),
    "result twice": (
        {"messages": [ASSISTANT | {"tool_calls": [CALL]}, *[{"role": "tool", "tool_call_id": "1", "content": ""}] * 2]},
        "nobody waits for",
    ),
    "no template": ({"template": None}, "E_TEMPLATE: the model has 0 chat templates"),
    "no place": ({"template": "{{ messages }}"}, "no place for tools"),
    "unknown": ({"template": "{{ tools }}"}, r"not read \(unknown\)"),
    "internlm": ({"template": "{{ tools }}<|action_start|>"}, r"not read \(InternLM's\)"),
    "dsml": ({"template": "{{ tools }}<|DSML|function_calls>"}, r"not read \(DeepSeek's DSML\)"),
    "a template that objects": (
        {"template": HERMES_TEMPLATE + "{{ raise_exception('never') }}"},
        r"E_TEMPLATE: the chat template refused 1 messages \(never\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(plain: Any, name: str) -> None:
    changes, why = REFUSED[name]
    tokenizer = dressed(plain, changes.get("template", HERMES_TEMPLATE))
    with pytest.raises(Refusal, match=why) as refusal:
        prepare(
            changes.get("messages", QUESTION),
            changes.get("tools", TOOLS),
            changes.get("tool_choice", "auto"),
            tokenizer,
        )
    assert "\n" not in str(refusal.value) and refusal.value.code in ("E_TOOLS", "E_TEMPLATE")


def test_a_schema_that_is_not_strict_may_say_more_than_can_be_enforced(plain: Any) -> None:
    loose = function(parameters={"properties": {"a": {"type": "array", "uniqueItems": True}}})
    assert prepare(QUESTION, [loose], "required", dressed(plain, HERMES_TEMPLATE)).mask is not None


def test_a_model_with_several_templates_is_asked_through_the_one_for_tools(plain: Any) -> None:
    tokenizer = dressed(plain, {"default": "{{ 'plain' }}", "tool_use": HERMES_TEMPLATE})
    assert "get_weather" in plain.decode(prepare(QUESTION, TOOLS, "auto", tokenizer).ids)
    assert plain.decode(prepare(QUESTION, TOOLS, "none", tokenizer).ids) == "plain"


def test_many_tools_fit_one_grammar(plain: Any) -> None:
    many = [function(name=f"tool_{n}", parameters=copy.deepcopy(WEATHER)) for n in range(tools_module.MOST_TOOLS)]
    assert prepare(QUESTION, many, "required", dressed(plain, HERMES_TEMPLATE)).mask is not None
