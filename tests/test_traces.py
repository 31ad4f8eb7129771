"""Traces are what the routers did: against stock models, in batches, with drafts, after a kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import toys

from duoserve import tracing
from duoserve.core import Phase, Refusal, Route, Step
from duoserve.sizing import CACHE
from traces import record
from traces.record import Recorder
from traces.store import Recorded, Traces

ROOT = Path(__file__).parent.parent
EXACT = {"dtype": "float32", "budget": "half"}


def recorder(engine: Any, folder: Path, choices: int = 2, hidden: bool = False, **options: Any) -> Recorder:
    """One that watches `engine`."""
    layers = engine.store.layers
    experts = [layer.n_experts for layer in layers]
    about = record.about(engine.store.fingerprint, engine.dtype, experts, [choices] * len(experts), hidden)
    made = Recorder(folder, about, engine.routers(), **options)
    engine.runtime.observers.append(made)
    return made


def recorded(folder: Path, **options: Any) -> list[Recorded]:
    return list(Traces(folder).sequences(**options))


def tokens(one: Recorded) -> list[int]:
    assert one.step.ids_BS is not None
    return one.step.ids_BS[0].tolist()


@torch.no_grad()
def stock_routes(folder: Path, ids_1S: torch.Tensor, names: list[str]) -> list[tuple[torch.Tensor, ...]]:
    """By layer, (x_TD, ids_TK, weights_TK): what the stock model's experts were called with; and its layers' inputs."""
    model, seen = toys.stock(folder), []
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args))
    model(ids_1S)
    return seen


def same_choice(a_TK: torch.Tensor, b_TK: torch.Tensor) -> bool:
    return bool(torch.equal(a_TK.sort(-1).values, b_TK.sort(-1).values))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_trace_is_what_the_stock_models_routers_did(toy: Any, load: Any, tmp_path: Path, family: str) -> None:
    engine = load(toy(family), **EXACT)
    watching = recorder(engine, tmp_path / "t", hidden=True)
    out = engine.generate(input_ids=toys.ids(1, 9), max_new_tokens=6, do_sample=False, eos_token_id=None)
    watching.close()
    (one,) = recorded(tmp_path / "t")
    assert tokens(one) == out[0, :-1].tolist()
    assert one.decode_S.tolist() == [False] * 9 + [True] * 5
    assert one.step.positions_BS.tolist() == [list(range(14))]
    stock = stock_routes(toy(family), out[:, :-1], [layer.module for layer in engine.store.layers])
    assert len(stock) == len(one.step.routes)
    for (x_TD, ids_TK, weights_TK), route in zip(stock, one.step.routes, strict=True):
        assert torch.equal(route.ids_TK, ids_TK)
        torch.testing.assert_close(route.weights_TK, weights_TK.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(route.hidden_TD, x_TD.reshape(-1, x_TD.shape[-1]), rtol=2e-3, atol=2e-3)
        assert route.hidden_TD.dtype == torch.float32
    for router, route in zip(Traces(tmp_path / "t").routers(), one.step.routes, strict=True):
        assert same_choice(router.scores(route.hidden_TD).topk(2).indices, route.ids_TK)
    assert sorted(one.step.inputs) == list(range(len(stock)))
    assert one.step.inputs[0].shape == one.step.routes[0].hidden_TD.shape


def test_a_batch_with_padding_is_its_sequences(toy: Any, load: Any, tmp_path: Path) -> None:
    engine = load(toy("mixtral"), **EXACT)
    rows = [toys.ids(1, n, seed=n) for n in (9, 4, 7)]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    watching = recorder(engine, tmp_path / "alone")
    outs = [engine.generate(input_ids=row, **options) for row in rows]
    watching.close()
    engine.runtime.observers.clear()
    ids_BS, mask_BS = tracing._padded([row[0] for row in rows], 0)
    watching = recorder(engine, tmp_path / "batch", flush_bytes=1)
    engine.generate(input_ids=ids_BS, attention_mask=mask_BS, **options)
    watching.close()
    alone, batch = recorded(tmp_path / "alone"), recorded(tmp_path / "batch")
    assert [tokens(one) for one in batch] == [tokens(one) for one in alone] == [out[0, :-1].tolist() for out in outs]
    assert [p[3:] for p in Traces(tmp_path / "batch").prompts] == [p[3:] for p in Traces(tmp_path / "alone").prompts]
    for a, b in zip(alone, batch, strict=True):
        assert torch.equal(a.decode_S, b.decode_S)
        assert torch.equal(a.step.positions_BS, b.step.positions_BS)
        assert all(torch.equal(x.ids_TK, y.ids_TK) for x, y in zip(a.step.routes, b.step.routes, strict=True))


def test_a_sequence_of_a_batch_ends_at_its_end(toy: Any, load: Any, tmp_path: Path) -> None:
    engine = load(toy("mixtral"), **EXACT)
    options = {"input_ids": toys.ids(2, 6), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    free = engine.generate(**options, eos_token_id=None)
    end = int(free[0, 8])
    cut = [row[: 6 + row[6:].index(end)] if end in row[6:] else row[:-1] for row in free.tolist()]
    watching = recorder(engine, tmp_path / "t", ends=[end])
    engine.generate(**options, eos_token_id=end)
    watching.close()
    assert [tokens(one) for one in recorded(tmp_path / "t")] == cut
    assert len(cut[0]) != len(cut[1])


def test_drafts_that_were_rejected_are_not_in_a_trace(toy: Any, load: Any, tmp_path: Path) -> None:
    engine = load(toy("mixtral"), **EXACT)
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    prompt = toys.ids(1, 5).repeat(1, 3)
    plain = recorder(engine, tmp_path / "plain")
    out = engine.generate(input_ids=prompt, **options)
    plain.close()
    engine.runtime.observers.clear()
    steps: list[Step] = []
    drafted = recorder(engine, tmp_path / "drafted", flush_bytes=1)
    engine.runtime.observers.append(steps.append)
    assert torch.equal(engine.generate(input_ids=prompt, prompt_lookup_num_tokens=3, **options), out)
    drafted.ended([out.shape[1] - 1])
    drafted.close()
    assert any(s.rows > 1 for s in steps[1:]) and sum(s.rows for s in steps) > out.shape[1] - 1
    (a,), (b,) = recorded(tmp_path / "plain"), recorded(tmp_path / "drafted")
    assert tokens(a) == tokens(b) == out[0, :-1].tolist()
    assert torch.equal(a.decode_S, b.decode_S)
    assert all(torch.equal(x.ids_TK, y.ids_TK) for x, y in zip(a.step.routes, b.step.routes, strict=True))


def test_a_prompt_read_in_chunks_is_one_sequence(toy: Any, load: Any, tmp_path: Path) -> None:
    engine = load(toy("mixtral"), **EXACT)
    ids = toys.ids(2, 60)
    watching = recorder(engine, tmp_path / "t")
    with torch.inference_mode():
        for row in ids[:, None]:
            out = engine.model(row[:, :20], use_cache=True)
            for at in (20, 40):
                out = engine.model(row[:, at : at + 20], use_cache=True, **{CACHE: out[CACHE]})
    watching.close()
    assert [tokens(one) for one in recorded(tmp_path / "t")] == ids.tolist()
    assert [prompt.n_tokens for prompt in Traces(tmp_path / "t").prompts] == [60, 60]


LAYERS, EXPERTS, CHOICES = 3, [6, 6, 4], [2, 2, 1]


def made_step(index: int, position: int, length: int, previous: Any = None) -> Step:
    """A pass of one sequence, all of it a function of its index."""
    generator = torch.Generator().manual_seed(index)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    step = Step(index, Phase.DECODE if position else Phase.PREFILL, length)
    step.ids_BS = (drawn(1, length) * 100).long()
    step.positions_BS = torch.arange(position, position + length)[None]
    for layer, (e, k) in enumerate(zip(EXPERTS, CHOICES, strict=True)):
        ids_TK = drawn(length, e).topk(k).indices
        step.routes.append(Route(layer, ids_TK, drawn(length, k), drawn(length, 8).bfloat16()))
        step.inputs[layer] = drawn(length, 8).bfloat16() * 1e6
    return step


def made_sequence(number: int) -> list[Step]:
    begin = number * 10
    return [made_step(begin, 0, 7), *(made_step(begin + n, 6 + n, 1) for n in range(1, 10))]


def made_recorder(folder: Path, hidden: bool = True, **options: Any) -> Recorder:
    about = record.about("f" * 32, torch.bfloat16, EXPERTS, CHOICES, hidden)
    return Recorder(folder, about, [None] * LAYERS, **options)


def made_trace(folder: Path, sequences: int = 6, every: int = 13, **options: Any) -> Path:
    """A trace in several parts that do not end where sequences do."""
    watching = made_recorder(folder, **options)
    for n, step in enumerate(step for number in range(sequences) for step in made_sequence(number)):
        watching(step)
        if n % every == every - 1:
            watching.flush()
    watching.close(0.5, 0.25)
    return folder


def is_made(one: Recorded) -> None:
    """Whether a sequence is what `made_sequence` says, as far as it goes."""
    steps = made_sequence(one.prompt.index)
    n = len(tokens(one))
    for layer in range(LAYERS):
        route = one.step.routes[layer]
        assert torch.equal(route.ids_TK, torch.cat([s.routes[layer].ids_TK for s in steps])[:n])
        assert torch.equal(route.weights_TK, torch.cat([s.routes[layer].weights_TK for s in steps])[:n])
        hidden = torch.cat([s.routes[layer].hidden_TD for s in steps])[:n]
        assert torch.equal(route.hidden_TD, hidden) and route.hidden_TD.dtype == torch.bfloat16
        entered = torch.cat([s.inputs[layer] for s in steps])[:n]
        assert torch.equal(one.step.inputs[layer], entered.clamp(-65504, 65504).half().bfloat16())
    assert tokens(one) == torch.cat([s.ids_BS[0] for s in steps])[:n].tolist()


def test_a_trace_reads_back_whatever_its_parts(tmp_path: Path) -> None:
    for every in (1, 13, 1000):
        folder = made_trace(tmp_path / str(every), every=every)
        found = recorded(folder)
        assert [one.prompt.index for one in found] == list(range(6))
        assert [len(tokens(one)) for one in found] == [16] * 6
        for one in found:
            is_made(one)
    about = Traces(folder).about
    assert (about.layer_s, about.slab_s, about.experts, about.choices) == (0.5, 0.25, EXPERTS, CHOICES)


def test_some_sequences_are_read_without_the_others(tmp_path: Path) -> None:
    folder = made_trace(tmp_path / "t")
    assert [one.prompt.index for one in recorded(folder, indices={4, 1, 99})] == [1, 4]
    bare = recorded(folder, indices=[2], hidden=False)
    assert bare[0].step.routes[0].hidden_TD is None and not bare[0].step.inputs


def test_a_recorded_step_is_not_changed_and_not_kept(tmp_path: Path) -> None:
    watching = made_recorder(tmp_path / "t")
    step = made_step(0, 0, 7)
    before = list(step.routes), dict(step.inputs)
    watching(step)
    step.inputs.clear()  # as the engine does with the pass before
    watching.close()
    assert before[0] == step.routes
    assert sorted(recorded(tmp_path / "t")[0].step.inputs) == [0, 1, 2]


def test_a_part_is_plain_parquet(tmp_path: Path) -> None:
    table = pq.read_table(made_trace(tmp_path / "t") / "part-00000.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types["layer"] == "int16" and types["phase"].startswith("dictionary<values=string")
    assert types["ids"].startswith("list<element: uint16") and types["weights"].startswith("list<element: float")
    assert "halffloat" in types["hidden"] and "halffloat" in types["input"]
    assert table.schema.metadata[b"duoserve.trace"] == b"1"


KILLED = """
import sys; sys.path.insert(0, sys.argv[2])
import test_traces as t
from pathlib import Path
watching = t.made_recorder(Path(sys.argv[1]), flush_bytes=4000)
number = 0
while True:
    for step in t.made_sequence(number):
        watching(step)
    number += 1
    print(watching.rows, flush=True)
"""


@pytest.mark.parametrize("moment", [2, 9, 25])
def test_a_trace_that_was_killed_can_be_read_up_to_the_last_flush(tmp_path: Path, moment: int) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    args = [sys.executable, "-c", KILLED, str(tmp_path / "t"), str(ROOT / "tests")]
    rng = random.Random(moment)
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT) as child:
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(moment)]
        for _ in range(rng.randrange(20_000)):  # somewhere in what follows
            pass
        os.kill(child.pid, signal.SIGKILL)
    found = recorded(tmp_path / "t")
    for one in found:
        is_made(one)
    rows = sum(len(tokens(one)) for one in found) * LAYERS
    assert rows >= said[-1] > 0
    assert len({len(tokens(one)) for one in found[:-1]}) == 1  # all but the last are whole


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_damage_is_refused_or_was_none(tmp_path: Path) -> None:
    folder = made_trace(tmp_path / "t", sequences=3, every=1000)
    part = folder / "part-00000.parquet"
    whole = part.read_bytes()
    refused = 0
    for at in range(5, len(whole), max(1, len(whole) // 150)):
        part.write_bytes(whole)
        flip(part, at)
        try:
            found = recorded(folder)
        except Refusal as refusal:
            refused += 1
            line = str(refusal)
            assert refusal.code == "E_TRACE" and "part-00000.parquet" in line and len(line.splitlines()) == 1, line
        else:
            for one in found:
                is_made(one)
    assert refused > 100
    for keep in (0, 3, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:keep])
        with pytest.raises(Refusal, match=r"E_TRACE: .*part-00000\.parquet is not as it was written"):
            recorded(folder)


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "trace.json").unlink(), r"holds no trace\.json"),
        (lambda f: changed(f / "trace.json", schema=2), r"trace of version 2, this program reads 1"),
        (lambda f: changed(f / "trace.json", experts=[6, 6]), r"no sound 'choices'"),
        (lambda f: changed(f / "trace.json", experts=[4, 6, 4]), r"part-00000\.parquet .*expert out of range"),
        (lambda f: changed(f / "trace.json", choices=[2, 2, 2]), r"part-00000\.parquet .*number of choices"),
        (lambda f: changed(f / "trace.json", fingerprint="a" * 32), r"part-00000\.parquet is of model f+, the trace of a"),
        (lambda f: (f / "prompts.jsonl").unlink(), r"prompts\.jsonl .*is missing"),
        (lambda f: (f / "prompts.jsonl").write_text('{"index": 0}\n'), r"prompts\.jsonl has no sound line 1"),
        (lambda f: (f / "prompts.jsonl").write_text(""), r"part-00000\.parquet has sequences 0 to \d, prompts\.jsonl has 0"),
        (lambda f: (f / "part-00001.parquet").unlink(), r"part-00001\.parquet is missing, part-00002\.parquet is there"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, harm: Any, says: str) -> None:
    folder = made_trace(tmp_path / "t")
    harm(folder)
    with pytest.raises(Refusal) as raised:
        recorded(folder)
    line = str(raised.value)
    assert raised.value.code == "E_TRACE" and re.search(says, line) and len(line.splitlines()) == 1, line


def test_damaged_routers_are_refused(tmp_path: Path) -> None:
    folder = made_trace(tmp_path / "t")
    (folder / "routers.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(Refusal, match=r"E_TRACE: .*routers\.safetensors is not as it was written"):
        Traces(folder).routers()
