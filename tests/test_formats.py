"""Families' formats: what their templates write is read back as it was, wherever it is cut; forced calls are what they
write; arguments without quotes become JSON by their schema. The templates are ours: what those families document, no more.
"""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from test_tools import HERMES_TEMPLATE, QUESTION, SCHEMAS, TOOLS, dressed, joined, plain, rolled  # noqa: F401

from duoserve.api.calls import Arguments, Call, Content, Delta, Parser, Reasoning
from duoserve.api.formats import HARMONY, format_of
from duoserve.api.tagged import json_of, kinds
from duoserve.api.tools import prepare
from duoserve.core import Refusal

BAR = "\N{FULLWIDTH VERTICAL LINE}"


def template(call: str, before: str = "", after: str = "", between: str = "", head: str = "") -> str:
    """One that shows tools, and writes each message as its role and text, calls as given."""
    return (
        "{% if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}"
        + "{% for message in messages %}{{ '<' + message.role + '>' }}{{ message.content }}"
        + "{% if message.tool_calls %}"
        + head
        + before
        + "{% for call in message.tool_calls %}"
        + call
        + ("{% if not loop.last %}" + between + "{% endif %}" if between else "")
        + "{% endfor %}"
        + after
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )


def tags(one: str) -> str:
    return "{% for key, value in call.function.arguments.items() %}" + one + "{% endfor %}"


VALUE = "{{ value if value is string else value | tojson }}"
NAME, JSON = "{{ call.function.name }}", "{{ call.function.arguments | tojson }}"
TEXT = "{{ '' + call.function.arguments }}"  # as DeepSeek's joins it
CALLS, CALL, SEP = (f"<{BAR}tool▁{word}{BAR}>" for word in ("calls▁begin", "call▁begin", "sep"))
CALL_END, CALLS_END = (f"<{BAR}tool▁{word}▁end{BAR}>" for word in ("call", "calls"))
NL = "{{ '\\n' }}"
HARMONY_CALL = "{{ '<|channel|>commentary to=functions.' }}" + NAME + "{{ ' <|constrain|>json<|message|>' }}" + JSON
TEMPLATES = {
    "glm-4.5": template(
        NL + "<tool_call>" + NAME + NL
        + tags("<arg_key>{{ key }}</arg_key>" + NL + "<arg_value>" + VALUE + "</arg_value>" + NL) + "</tool_call>"
    ),
    "qwen3-coder": template(
        NL + "<tool_call>" + NL + "<function=" + NAME + ">" + NL
        + tags("<parameter={{ key }}>" + NL + VALUE + NL + "</parameter>" + NL) + "</function>" + NL + "</tool_call>"
    ),
    "minimax-m2": template(
        '<invoke name="' + NAME + '">' + NL + tags('<parameter name="{{ key }}">' + VALUE + "</parameter>" + NL)
        + "</invoke>" + NL,
        before=NL + "<minimax:tool_call>" + NL, after="</minimax:tool_call>",
    ),
    "deepseek-v3": template(
        CALL + "function" + SEP + NAME + NL + "```json" + NL + TEXT + NL + "```" + CALL_END,
        before=CALLS, after=CALLS_END, between=NL,
    ),
    "deepseek-v3.1": template(CALL + NAME + SEP + TEXT + CALL_END, before=CALLS, after=CALLS_END),
    "kimi-k2": template(
        "<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>" + JSON + "<|tool_call_end|>",
        before="<|tool_calls_section_begin|>", after="<|tool_calls_section_end|>",
    ),
    "mistral's [ARGS]": template("[TOOL_CALLS]" + NAME + "[ARGS]" + JSON),
    "granite": template(
        '{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}',
        before="<|tool_call|>[", after="]", between="{{ ', ' }}",
    ),
    "llama": template(
        """{{ '{"name": "' }}""" + NAME + """{{ '", "parameters": ' }}""" + JSON + "{{ '}' }}", head="{# <|python_tag|> #}"
    ),
    "harmony": template(HARMONY_CALL),
    "hermes": HERMES_TEMPLATE,
}  # fmt: skip


def calls(dice: random.Random, nasty: bool) -> list[tuple[str, dict[str, Any]]]:
    """Of the two tools, by their schemas' types; one of them has more arguments than its schema knows."""
    words = ["Rome", "", "5", "true", "null", "[1]", '"x"', "a b", "é🙂", "\n x \n", "</tool", "{", "<", "a\\b"]
    found = []
    for _ in range(dice.choice([1, 1, 2, 3])):
        arguments: dict[str, Any] = {"city": dice.choice(words) if nasty else "Rome"}
        if dice.random() < 0.6:
            arguments["days"] = dice.randrange(1, 10)
        if dice.random() < 0.4:
            arguments["list"] = dice.choice([[], [1, "]", {"a": None}], [True]])
        found.append(("get_weather", arguments) if dice.random() < 0.7 else ("add-node", {"kind": "leaf", "on": True}))
    return found


def written(tokenizer: Any, name: str, asked: list[tuple[str, dict[str, Any]]]) -> str:
    """What the family's template makes of an answer with these calls."""
    messages = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": f"functions.{f}:{n}", "type": "function", "function": {"name": f, "arguments": json.dumps(a)}}
                for n, (f, a) in enumerate(asked)
            ],
        },
    ]
    text: str = tokenizer.decode(prepare(messages, TOOLS, "auto", tokenizer).ids)
    return (
        text.rpartition("<assistant>")[0].rpartition("<assistant>")[2]
        if name != "hermes"
        else (text.rpartition("<|assistant|>\n")[0].rpartition("<|assistant|>\n")[2].removesuffix("<|endoftext|>"))
    )


def read(parser: Parser, text: str, cuts: list[int], finish: str = "stop") -> list[Delta]:
    found: list[Delta] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += parser.put(text[begin:end])
    return found + parser.end(finish)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_is_read_back_wherever_it_is_cut(plain: Any, name: str) -> None:  # noqa: F811
    tokenizer = dressed(plain, TEMPLATES[name])
    dice = random.Random(7)
    found = format_of(TEMPLATES[name])
    assert not isinstance(found, str) and found.name == name
    prepared = prepare(QUESTION, TOOLS, "auto", tokenizer)
    for case in range(4):
        asked = calls(dice, nasty=case > 0)[: 1 if name == "harmony" else 3]
        said = "" if name in ("harmony", "llama") else "Let me see. <"  # these call first or not at all
        text, want = said + written(tokenizer, name, asked) + "\n", (said, asked)
        cuttings = [sorted(dice.sample(range(1, len(text)), 5)) for _ in range(20)]
        cuttings += [[at] for at in range(1, len(text)) if case == 1]
        for cuts in cuttings:
            parser = Parser(prepared.format)
            content, got = joined(read(parser, text, cuts))
            assert (content, [(f, json.loads(a)) for f, a in got]) == want, (text, cuts)
            assert parser.finish("stop") == "tool_calls"


LETTERS = ["glm-4.5", "deepseek-v3"]  # whose markers are tried without tokens of their own, too
CASES = [(name, True) for name in TEMPLATES if name != "hermes"] + [(name, False) for name in LETTERS]


@pytest.mark.parametrize(("name", "special"), CASES, ids=str)
def test_forced_calls_are_the_family_s_own(plain: Any, name: str, special: bool) -> None:  # noqa: F811
    found = format_of(TEMPLATES[name])
    assert not isinstance(found, str)
    tokenizer = dressed(plain, TEMPLATES[name], *(found.markers if special else ()), special=special)
    prepared, ends = prepare(QUESTION, TOOLS, "required", tokenizer, parallel=name != "harmony"), 0
    for seed in range(2 if special else 1):
        deltas, text, ended = rolled(prepared, tokenizer, seed)
        content, got = joined([delta for delta in deltas if not isinstance(delta, Reasoning)])
        assert content == "", text
        assert got or name == "harmony"  # which may still be thinking
        for function, arguments in got if ended else got[:-1]:
            jsonschema.validate(json.loads(arguments), SCHEMAS[function])
        ends += ended
    assert ends or not special


def test_arguments_without_quotes_become_json_by_their_schema() -> None:
    known = {"string": {"string"}, "whole": {"integer"}, "maybe": {"string", "null"}, "unknown": None}
    for text, kind, want in (
        ("5", "string", '"5"'), ("5", "whole", "5"), ("5", "unknown", "5"), ("5.0", "whole", "5.0"),
        ("5.5", "whole", '"5.5"'),
        ("True", "unknown", "true"), ("True", "string", '"True"'), ("null", "maybe", "null"), ("7", "maybe", '"7"'),
        ('"a"', "string", '"\\"a\\""'), ("NaN", "unknown", '"NaN"'), ("[" * 9999, "unknown", json.dumps("[" * 9999)),
        ('{"a": [1]}', "unknown", '{"a": [1]}'), ("", "unknown", '""'),
    ):  # fmt: skip
        assert json_of(text, known[kind]) == want, (text[:20], kind)
    root = {"$defs": {"k": {"enum": ["a", 1]}, "me": {"$ref": "#/$defs/me"}}}
    assert kinds({"$ref": "#/$defs/k"}, root) == {"string", "number", "integer"}
    assert kinds({"$ref": "#/$defs/me"}, root) is None and kinds(True, root) is None
    assert kinds({"anyOf": [{"type": "number"}, {"type": "null"}]}, root) == {"number", "integer", "null"}


def test_a_strict_text_that_tags_cannot_be_held_to_is_refused(plain: Any) -> None:  # noqa: F811
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x+$"}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    tokenizer = dressed(plain, TEMPLATES["glm-4.5"])
    with pytest.raises(Refusal, match="E_TOOLS: the parameter 'a' of f is text that"):
        prepare(QUESTION, [tool], "required", tokenizer)
    assert prepare(QUESTION, [tool], "auto", tokenizer).mask is None


HARMONY_ANSWERS = [
    (
        "<|channel|>analysis<|message|>Think: 1 < 2.<|end|><|start|>assistant<|channel|>final<|message|>Yes.\n",
        ("Yes.\n", "Think: 1 < 2.", []),
    ),
    (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": "<|"}',
        ("I look.", "", [("f", '{"a": "<|"}')]),
    ),
    (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', ("", "", [("f", '{"a": 1}')])),
    ("<|channel|>analysis to=browser.search<|message|>q<|call|>", ("", "q", [])),
    ("Plain < text <| as it is", ("Plain < text <| as it is", "", [])),
    ("<|channel|>final<|message|>One<|end|><|start|>assistant<|channel|>final<|message|>Two", ("One\n\nTwo", "", [])),
]


@pytest.mark.parametrize("answer", HARMONY_ANSWERS, ids=range(len(HARMONY_ANSWERS)))
def test_channels_are_reasoning_answer_and_calls(answer: Any) -> None:
    from dataclasses import replace

    text, want = answer
    for at in range(len(text)):
        parser = Parser(replace(HARMONY, schemas={"f": {}}))
        deltas = read(parser, text, [at] if at else [])
        thought = "".join(delta.text for delta in deltas if isinstance(delta, Reasoning))
        content, got = joined([delta for delta in deltas if not isinstance(delta, Reasoning)])
        assert (content, thought, got) == want, at
        assert parser.finish("stop") == ("tool_calls" if got else "stop")


def test_harmony_is_read_without_tools_and_its_json_answers_stand_in_the_last_channel(plain: Any) -> None:  # noqa: F811
    tokenizer = dressed(plain, TEMPLATES["harmony"], *HARMONY.markers, special=True)
    prepared = prepare(QUESTION, None, None, tokenizer)
    assert prepared.format is not None and len(prepared.visible) == len(HARMONY.markers)
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMAS["add-node"]}}
    prepared, ends = prepare(QUESTION, None, None, tokenizer, answer=asked), 0
    for seed in range(3):
        deltas, _, ended = rolled(prepared, tokenizer, seed, calls=False)
        content, _ = joined([delta for delta in deltas if not isinstance(delta, Reasoning)])
        if ended:
            jsonschema.validate(json.loads(content), SCHEMAS["add-node"])
            ends += 1
    assert ends


def test_an_answer_that_is_json_but_no_call_is_told_whole() -> None:
    llama = format_of("<|python_tag|>")
    assert not isinstance(llama, str)
    for text, content, called in (
        ('{"a": [1, "}"]} and so on', '{"a": [1, "}"]} and so on', []),
        (" {x} and <|python", " {x} and <|python", []),
        ("<b> is bold", "<b> is bold", []),
        ('{"a": 1', '{"a": 1', []),
        ("<|py", "<|py", []),
        ('<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        (
            'Well.<|python_tag|>{"name": "f", "parameters": {}};{"name": "g"}\nDone',
            "Well.Done",
            [("f", "{}"), ("g", "{}")],
        ),
    ):
        for at in range(1, len(text)):
            assert joined(read(Parser(llama), text, [at])) == (content, called), (text, at)


def test_a_call_cut_short_or_malformed_leaves_the_rest_readable() -> None:
    glm = format_of("<arg_key>")
    assert not isinstance(glm, str)
    parser = Parser(glm)
    assert joined(parser.put("<tool_call>not a call</tool_call> b") + parser.end()) == ("not a call b", [])
    parser = Parser(glm)
    found = parser.put("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x")
    assert [type(d) for d in found] == [Call, Arguments] and parser.end("length") == []
    assert parser.finish("length") == "length"
    qwen = format_of("<parameter=")
    assert not isinstance(qwen, str)
    parser = Parser(qwen)
    forgotten = "<tool_call>\n<function=f>\n</function>\n<tool_call>\n<function=g>\n</function>\n</tool_call>."
    assert joined(parser.put(forgotten) + parser.end()) == (".", [("f", "{}"), ("g", "{}")])
    kimi = format_of("<|tool_calls_section_begin|>")
    assert not isinstance(kimi, str)
    parser = Parser(kimi)
    begin = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:7<|tool_call_argument_begin|>{}<|tool_call_end|>"
    )
    [call, *_] = parser.put(begin)
    assert isinstance(call, Call) and (call.id, call.name) == ("functions.f:7", "f")
    assert parser.put("<|tool_calls_section_end|>after") == [Content("after")]
