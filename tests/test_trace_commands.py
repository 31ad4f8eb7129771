"""`duoserve trace` and `trace-stats`: real prompts, real files, a real Ctrl-C."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_traces import recorded, same_choice, tokens

from duoserve import cli, tracing
from traces.store import Traces

ROOT = Path(__file__).parent.parent


def run(*args: object) -> None:
    cli.app([str(a) for a in args], standalone_mode=False)


def test_the_commands_make_a_trace_and_say_what_is_in_it(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    (texts / "notes").mkdir(parents=True)
    lines = [{"text": "A list is"}, {"prompt": "Git is", "id": "git", "domain": "tools"}]
    lines.append({"messages": [{"role": "user", "content": "What is a list?"}]})
    (texts / "some.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (texts / "notes" / "a.txt").write_text("The kernel is " * 40)
    (texts / "notes" / "README.md").write_text("not a prompt")
    out = tmp_path / "trace"
    run("trace", "--prompts", texts, "-o", out, "--new-tokens", 6, "--batch", 2, "--limit-tokens", 50, "--hidden",
        "--cache-dir", cache)  # fmt: skip
    assert re.search(r"trace: 4 of 4 prompts, [\d,]+ rows, ", capsys.readouterr().out)
    traces = Traces(out)
    assert [(p.id, p.domain) for p in traces.prompts] == [
        ("a", "notes"), ("some-1", "some"), ("git", "tools"), ("some-3", "some")
    ]  # fmt: skip
    assert traces.prompts[0].n_tokens == 50
    assert traces.about.layer_s and traces.about.slab_s and traces.about.residency and traces.about.hidden
    for one in traces.sequences():
        assert 1 <= one.decode_S.sum() <= 5
        for router, route in zip(traces.routers(), one.step.routes, strict=True):
            assert same_choice(router.scores(route.hidden_TD).topk(4).indices, route.ids_TK)
    run("trace-stats", out, "--json", "--plots", tmp_path / "plots")
    found = json.loads(capsys.readouterr().out)
    assert found["decode"]["tokens"] < found["all"]["tokens"]
    assert found["all"]["lru_hit_rate"]["100%"] > found["all"]["lru_hit_rate"]["25%"] > 0
    assert len(list((tmp_path / "plots").glob("*.png"))) == 6
    run("trace-stats", out)
    assert "entropy over uniform" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_trace(load: Any, tmp_path: Path) -> None:
    engine = load()
    prompts = [tracing.Prompt(str(n), "d", text) for n, text in enumerate(("A list is", "The kernel"))]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tracing.record(engine, prompts, tmp_path / name, tracing.Run(new_tokens=8, seed=seed))
    a, b, c = ([tokens(one) for one in recorded(tmp_path / name)] for name in "abc")
    assert a == b != c
    assert not engine.runtime.observers


def test_ctrl_c_keeps_what_was_recorded(load: Any, tmp_path: Path) -> None:
    engine = load()
    prompts = [tracing.Prompt(str(n), "d", "A list is") for n in range(5)]

    def stop(done: int, total: int, rows: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole, said = tracing.record(engine, prompts, tmp_path / "t", tracing.Run(new_tokens=3), stop)
    assert not whole and "2 of 5 prompts" in said and said.endswith("interrupted, what is written is whole")
    assert len(recorded(tmp_path / "t")) == 2
