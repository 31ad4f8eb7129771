"""What a model writes for itself is told apart from its answer: by the reader, by the server, in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from servers import CHAT, running
from test_formats import TEMPLATES, joined, read

import duoserve
from duoserve import repl
from duoserve.api.calls import Parser, Reasoning
from duoserve.api.formats import HERMES
from duoserve.api.thoughts import Thought, thought_of
from duoserve.conversation import Conversation
from duoserve.remote import RemoteConversation, Server

OPENED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n{# </think> #}"
FREE, BEGUN = Thought("<think>", "</think>"), Thought("<think>", "</think>", begun=True)
HELLO = [{"role": "user", "content": "What is Git?"}]
ANSWERS: list[tuple[Thought, str, str, str, str]] = [  # how, text, finish -> answer, thought
    (FREE, "<think>\nHm. 1 < 2 </t\n\nOr </think>\n\nYes.\n", "stop", "Yes.\n", "Hm. 1 < 2 </t\n\nOr"),
    (FREE, "\n <think></think>Yes.", "stop", "Yes.", ""),
    (FREE, "<think>\n\n</think>\n\nYes.", "stop", "Yes.", ""),
    (FREE, " Yes <think>no</think>", "stop", " Yes <think>no</think>", ""),
    (FREE, "<thi", "stop", "<thi", ""),
    (FREE, "<thinking> is", "stop", "<thinking> is", ""),
    (FREE, "<think>Hm \n", "length", "", "Hm"),
    (BEGUN, "Hm.\n</think>\n\n</think> Yes.", "stop", "</think> Yes.", "Hm."),
    (BEGUN, "Hm.</thi", "length", "", "Hm."),
    (BEGUN, "Hm.</thi", "stop", "", "Hm.</thi"),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with duoserve.load(None, predictor="none", sequences=2) as engine:
        yield engine


def told(parser: Parser, text: str, cuts: list[int], finish: str) -> tuple[str, str, list[Any]]:
    deltas = read(parser, text, cuts, finish)
    content, calls = joined([delta for delta in deltas if not isinstance(delta, Reasoning)])
    return content, "".join(delta.text for delta in deltas if isinstance(delta, Reasoning)), calls


@pytest.mark.parametrize("case", ANSWERS, ids=range(len(ANSWERS)))
def test_a_thought_is_no_part_of_the_answer_wherever_it_is_cut(case: Any) -> None:
    how, text, finish, answer, thought = case
    for at in range(len(text)):
        assert told(Parser(None, how), text, [at] if at else [], finish) == (answer, thought, []), at


def test_calls_follow_a_thought() -> None:
    text = '<think>\n<tool_call> it is</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for at in range(1, len(text)):
        assert told(Parser(HERMES, FREE), text, [at], "stop") == ("", "<tool_call> it is", [("f", "{}")]), at


def test_the_template_says_whether_and_where_a_thought_begins() -> None:
    both = "{{ '<think>' }} {{ '</think>' }}"
    assert thought_of(both, "user: Hi\nassistant:") == FREE
    assert thought_of(both, "assistant: <think>\n") == BEGUN
    assert thought_of(both, "assistant: <think>\n\n</think>\n\n") is None
    assert thought_of("{{ '[THINK]' }}[/THINK]", "[/INST]") == Thought("[THINK]", "[/THINK]")
    assert thought_of("{{ messages }}", "<think>") is None


def test_a_server_tells_thoughts_apart_and_forms_have_none(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", OPENED)
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    with running(engine) as server:
        made = server.ask(CHAT, asked).json["choices"][0]["message"]
        assert made["content"] == "" and made["reasoning"]
        held = server.ask(CHAT, asked | {"response_format": {"type": "json_object"}}).json["choices"][0]["message"]
        assert held["content"].startswith("{") and "reasoning" not in held
        chat, thoughts, words = RemoteConversation(Server(server.url)), list[str](), list[str]()
        told = {"on_text": words.append, "on_reasoning": thoughts.append}
        answer = chat.say("What is Git?", max_new_tokens=8, do_sample=False, **told)
        assert answer.reasoning == "".join(thoughts) == made["reasoning"] and answer.text == "" and not words
        assert chat.messages[-1] == {"role": "assistant", "content": ""}  # it is not read again


def test_a_conversation_here_tells_thoughts_apart(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    plain = Conversation(engine).say("What is Git?", **said)
    assert plain.text and not plain.reasoning
    monkeypatch.setattr(engine.tokenizer, "chat_template", OPENED)
    for more in ({}, {"num_beams": 2}):
        chat, thoughts = Conversation(engine), list[str]()
        answer = chat.say("What is Git?", on_text=pytest.fail, on_reasoning=thoughts.append, **said, **more)
        assert answer.text == "" and answer.reasoning == "".join(thoughts) != ""
        assert repl.figures(engine, answer)["reasoning"] == answer.reasoning


def test_channels_are_seen_here_though_they_are_special_tokens(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    end = engine.tokenizer.eos_token
    shown = engine.generate(HELLO, do_sample=False, visible={engine.tokenizer.eos_token_id})
    assert shown.finish == "stop" and shown.text.endswith(end) and shown.text.count(end) == 1
    assert engine.generate(HELLO, do_sample=False).text == shown.text.removesuffix(end)
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATES["harmony"])
    answer = Conversation(engine).say("What is Git?", max_new_tokens=8, do_sample=False)
    assert answer.text and not answer.reasoning  # text without any header is the answer


def test_a_terminal_shows_thoughts_dim_and_obeys_no_model(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(terminal: bool) -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        show = repl._Progress("layer")
        show.reasoning("Hm")
        show.reasoning("\x1b]0;")
        show.text("Yes\x1b[2J\x9b.\n")
        show.end()
        return str(capsys.readouterr().out)

    monkeypatch.setenv("TERM", "xterm")
    sign = "\N{REPLACEMENT CHARACTER}"
    assert shown(True) == f"\x1b[2mHm\x1b[22m\x1b[2m{sign}]0;\x1b[22m\n\nYes{sign}[2J{sign}.\n\n"
    assert shown(False) == "Yes\x1b[2J\x9b.\n\n"  # a file gets the answer as it is, alone
