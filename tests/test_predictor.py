"""Predictors: what they see in serving is what they saw in training, what they claim is measured fairly, and nothing that
is loaded is trusted. Traces come from stock models of toy size, through hooks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from mutations import mutate_tree
from typer.testing import CliRunner

from duoserve import cli
from duoserve.checkpoint import find_experts
from duoserve.core import Phase, Predictor, Refusal, Route, Step, When
from duoserve.model import decoder_layer
from duoserve.routers import Router, routers_of
from predictor import evaluate
from predictor.baselines import AlwaysWrong, Control, Gate, Oracle, Popularity, PreviousToken, TraceMatching
from predictor.features import features
from predictor.load import ABOUT, TENSORS, check_model, load, load_folder, save_folder
from predictor.model import Shape, head_features
from predictor.score import slot_recall
from predictor.train import Options, train
from traces.record import about as about_trace
from traces.schema import PromptInfo
from traces.store import Columns, Recorded, Traces, Writer

PRINT = "ab" * 32


def captured(model: Any, ids_BS: torch.Tensor) -> tuple[list[Step], list[Router | None]]:
    """What a stock model's routers do: a merged Step per sequence."""
    names = [spec.name for spec in find_experts(model)]
    seen: dict[Any, Any] = {}
    hooks = []
    for layer, name in enumerate(names):

        def routed(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            seen[layer] = [t.detach().flatten(0, -2) for t in (*args, *kwargs.values())[:3]]

        def entered(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            seen["in", layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        hooks.append(model.get_submodule(name).register_forward_pre_hook(routed, with_kwargs=True))
        hooks.append(model.get_submodule(decoder_layer(name)).register_forward_pre_hook(entered, with_kwargs=True))
    with torch.no_grad():
        model(ids_BS, use_cache=False)
    for hook in hooks:
        hook.remove()
    steps = []
    length = ids_BS.shape[1]
    for b, ids_S in enumerate(ids_BS):
        rows = slice(b * length, (b + 1) * length)
        step = Step(b, Phase.PREFILL, length, 1, ids_S[None], torch.arange(length)[None])
        for layer in range(len(names)):
            x_TD, ids_TK, weights_TK = seen[layer]
            step.routes.append(Route(layer, ids_TK[rows].long(), weights_TK[rows].float(), x_TD[rows]))
            step.inputs[layer] = seen["in", layer][b]
        steps.append(step)
    return steps, routers_of(model, names)


def write_trace(folder: Path, steps: list[Step], routers: list[Router | None], n_domains: int = 2) -> Path:
    """As `duoserve trace --hidden` would."""
    experts, choices = [6] * len(steps[0].routes), [2] * len(steps[0].routes)
    writer = Writer(folder, about_trace(PRINT, torch.bfloat16, experts, choices, hidden=True), routers)
    writer.prompts([
        PromptInfo(i, f"p{i}", f"domain-{i % n_domains}", f"{i:016x}", steps[i].rows) for i in range(len(steps))
    ])  # fmt: skip
    n = [step.rows for step in steps]
    layers = range(len(experts))
    writer.write(
        Columns(
            np.repeat(np.arange(len(steps)), n),
            np.repeat(np.arange(len(steps)), n),
            np.concatenate([np.arange(i) for i in n]),
            torch.cat([s.ids_BS[0] for s in steps]).numpy(),
            np.concatenate([np.arange(i) >= i // 2 for i in n]),
            [torch.cat([s.routes[layer].ids_TK for s in steps]).numpy() for layer in layers],
            [torch.cat([s.routes[layer].weights_TK for s in steps]).numpy() for layer in layers],
            [torch.cat([s.routes[layer].hidden_TD for s in steps]).half().numpy() for layer in layers],
            [torch.cat([s.inputs[layer] for s in steps]).half().numpy() for layer in layers],
        )
    )
    return folder


@pytest.fixture(scope="session")
def stock_steps(toy: Callable[..., Path]) -> tuple[list[Step], list[Router | None]]:
    model = toys.stock(toy("qwen3_moe", dtype=torch.bfloat16), torch.bfloat16)
    return captured(model, toys.ids(40, 24, seed=3))


@pytest.fixture(scope="session")
def trace(stock_steps: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("traces") / "toy", *stock_steps)


@pytest.fixture(scope="session")
def trained(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per kind."""
    folders = {}
    for kind in ("head", "pre-attention", "mlp", "matching", "popularity"):
        folders[kind] = tmp_path_factory.mktemp("predictors") / kind
        make(trace, folders[kind], kind)
    return folders


def make(trace: Path, out: Path, kind: str, **options: Any) -> Any:
    predictor, training = train(Traces(trace), Options(kind, **({"epochs": 2, "units": 8} | options)), lambda *_: None)
    save_folder(out, kind, predictor, training)
    return predictor, training


def everything(trained: dict[str, Path], routers: list[Router | None], shape: Shape) -> list[Any]:
    loaded: list[Any] = [load(folder) for folder in trained.values()]
    return [*loaded, Gate(routers), Gate(routers, 2), PreviousToken(shape), Popularity(shape)]


SHAPE = Shape(PRINT, (6, 6, 6), (2, 2, 2), 64)


def test_serving_sees_row_by_row_what_training_saw_in_one_step(stock_steps: Any, trained: dict[str, Path]) -> None:
    steps, routers = stock_steps
    single = evaluate.singles(steps[0])
    for layer, lead in ((0, 1), (1, 1), (2, 1), (2, 2)):
        wanted = head_features(layer, lead, inputs=True)
        whole_TN = features(steps[0], wanted, SHAPE.experts, SHAPE.dim)
        rows = [features(known(s, layer, lead), wanted, SHAPE.experts, SHAPE.dim) for s in single]
        assert torch.equal(whole_TN, torch.cat(rows))
    for predictor in everything(trained, routers, SHAPE):
        for layer in range(3):
            if predictor.when(layer) is None:
                continue
            whole_TE = predictor.rank_rows(steps[0], layer)
            found = []
            for s in single:
                found.append(predictor.rank(known(s, layer, predictor.lead), layer))
                predictor.observe(s)
            torch.testing.assert_close(torch.stack(found), whole_TE, rtol=1e-3, atol=1e-4, msg=predictor.name)


def known(step: Step, layer: int, lead: int) -> Step:
    """What is known of a running pass when a predictor is asked about `layer`."""
    inputs = {n: x for n, x in step.inputs.items() if n <= layer - (1 if lead > 1 and layer >= lead else 0)}
    return replace(step, routes=[r for r in step.routes if r.layer <= layer - lead], inputs=inputs)


def test_a_batch_of_sequences_is_ranked_as_each_alone(stock_steps: Any, trained: dict[str, Path]) -> None:
    steps, routers = stock_steps
    a, b = (evaluate.singles(step) for step in steps[:2])
    both: list[Step] = []
    for one, two in zip(a, b, strict=True):
        joined = Step(one.index, one.phase, 2, 2, torch.cat([one.ids_BS, two.ids_BS]))
        joined.positions_BS = torch.cat([one.positions_BS, two.positions_BS])
        joined.routes = [
            Route(p.layer, *(torch.cat([x, y]) for x, y in zip(p[1:], q[1:], strict=True)))
            for p, q in zip(one.routes, two.routes, strict=True)
        ]
        joined.inputs = {n: torch.cat([one.inputs[n], two.inputs[n]]) for n in one.inputs}
        joined.previous = both[-1] if both else None
        both.append(joined)
    for predictor in everything(trained, routers, SHAPE):
        for step in both[:6]:
            got = predictor.rank_rows(step, 2)
            torch.testing.assert_close(predictor.rank(step, 2), got.sum(0))
            predictor.observe(step)
        for n, single in enumerate((a, b)):
            for step in single[:6]:
                alone = predictor.rank_rows(step, 2)
                predictor.observe(step)
            torch.testing.assert_close(got[n : n + 1], alone, rtol=1e-3, atol=1e-4, msg=predictor.name)


@pytest.mark.parametrize("family", sorted(toys.PROMISED))
def test_the_control_reads_100_percent(family: str, toy: Callable[..., Path]) -> None:
    steps, routers = captured(toys.stock(toy(family)), toys.ids(6, 20))
    experts = tuple(int(r.weight_ED.shape[0]) for r in routers if r is not None)
    assert len(experts) == len(steps[0].routes)
    shape = Shape(PRINT, experts, (2,) * len(experts), 64)
    report = evaluate.Report(evaluate.Entry("control", Control(routers)), shape, 1)
    for n, step in enumerate(steps):
        report.note(
            Recorded(PromptInfo(n, "p", "d", "0", 20), step, torch.zeros(20, dtype=torch.bool)), torch.ones(20) > 0
        )
    for layer in range(len(experts)):
        assert report.at(layer).figures(2, 1)["exact"] == 1.0


def test_oracle_names_all_and_always_wrong_none_of_the_chosen(stock_steps: Any) -> None:
    steps, _ = stock_steps
    for kind, share in ((Oracle, 1.0), (AlwaysWrong, 0.0)):
        predictor = kind(steps, [6] * 3)
        assert predictor.when(0) is When.START
        for step in steps[3:5]:
            assert slot_recall(predictor.rank_rows(step, 1), step.routes[1].ids_TK) == share
            for s in evaluate.singles(step):  # decoding: found again by the tokens so far
                scores = predictor.rank(known(s, 1, 1), 1)[None]
                assert slot_recall(scores, s.routes[1].ids_TK) == share
                predictor.observe(s)
        other = replace(steps[0], ids_BS=steps[0].ids_BS + toys.VOCAB)
        assert not predictor.rank_rows(other, 1).any()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(trace: Path, tmp_path: Path) -> None:
    for kind in ("head", "mlp", "matching"):
        written = []
        for n, seed in enumerate((5, 5, 6)):
            make(trace, tmp_path / f"{kind}{n}", kind, seed=seed, epochs=1)
            written.append([(tmp_path / f"{kind}{n}" / name).read_bytes() for name in (ABOUT, TENSORS)])
        assert written[0] == written[1]
        assert written[0] != written[2]


def test_what_was_trained_is_what_is_loaded(trace: Path, stock_steps: Any, tmp_path: Path) -> None:
    steps, _ = stock_steps
    for kind in ("head", "pre-attention", "mlp", "matching", "popularity"):
        predictor, training = make(trace, tmp_path / kind, kind, epochs=1)
        folder = load_folder(tmp_path / kind)
        again: Predictor = folder.predictor
        assert folder.training == training and folder.kind == kind
        assert (again.name, again.lead, again.n_params) == (kind, 1, predictor.n_params)
        assert again.fingerprint == PRINT
        for layer in range(3):
            assert again.when(layer) == predictor.when(layer)
            if again.when(layer) is not None:
                assert torch.allclose(again.rank_rows(steps[0], layer), predictor.rank_rows(steps[0], layer), atol=1e-3)


def test_a_head_learns_what_the_gate_cannot_know(trace: Path, tmp_path: Path, stock_steps: Any) -> None:
    predictor, training = make(trace, tmp_path / "head", "head", epochs=12, units=32)
    gate = Gate(stock_steps[1])
    items = list(Traces(trace).sequences())
    held = [i for i in items if i.prompt.digest not in training.prompts]

    def recall(p: Any) -> float:
        ids_TK = torch.cat([i.step.routes[2].ids_TK for i in held])
        return slot_recall(torch.cat([p.rank_rows(i.step, 2) for i in held]), ids_TK)

    assert held and recall(predictor) > recall(gate) - 0.02
    assert predictor.when(0) is When.INPUT and predictor.when(1) is When.ROUTE


def test_a_split_by_prompt_keeps_prompts_apart_and_one_by_token_leaks(trace: Path, tmp_path: Path) -> None:
    """A trace whose prompts are noise: what was seen of a prompt says all about its other tokens, and nothing of others'."""
    experts, rows = 6, 40
    steps = []
    for n in range(30):
        generator = torch.Generator().manual_seed(n)
        map_EE = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(experts)])
        first_S = torch.randint(0, experts, (rows,), generator=generator)
        step = Step(n, Phase.PREFILL, rows, 1, torch.full((1, rows), n), torch.arange(rows)[None])
        step.routes = [Route(0, torch.stack([first_S, (first_S + 1 + n % 5) % experts], 1), torch.full((rows, 2), 0.5),
                             torch.zeros(rows, 64))]  # fmt: skip
        step.routes += [
            Route(n_l, map_EE[first_S], torch.full((rows, 2), 0.5), torch.zeros(rows, 64)) for n_l in (1, 2)
        ]
        step.inputs = {at: torch.nn.functional.one_hot(torch.tensor(n), 64).float().expand(rows, 64) for at in range(3)}
        steps.append(step)
    folder = write_trace(tmp_path / "noise", steps, Traces(trace).routers())
    figures = {}
    for split in ("prompt", "token"):
        _, training = make(folder, tmp_path / split, "head", split=split, epochs=40, units=64, batch=64, patience=40)
        figures[split] = training.test["slot_recall"]
        assert len(training.prompts) == (27 if split == "prompt" else 30)
    assert figures["token"] > figures["prompt"] + 0.1


def test_a_bound_on_tokens_takes_prompts_from_anywhere_in_the_trace(trace: Path) -> None:
    for split in ("prompt", "token"):
        predictor, training = train(Traces(trace), Options("popularity", split=split, tokens=240), lambda *_: None)
        assert 200 <= training.rows <= 300 and predictor.counts_LE.sum() > 0
        learned = training.prompts if split == "token" else sorted(training.prompts)
        assert max(int(digest, 16) for digest in learned) > 20


def test_figures_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, recall_score

    torch.manual_seed(0)
    scores_TE, ids_TK = torch.randn(200, 8), torch.stack([torch.randperm(8)[:3] for _ in range(200)])
    counts = evaluate.Counts(8)
    counts.add(scores_TE, ids_TK)
    truth, guess = (torch.zeros(200, 8).scatter(1, i, 1.0).numpy() for i in (ids_TK, scores_TE.topk(3).indices))
    found = counts.figures(3, 2)
    assert found["slot_recall"] == pytest.approx(recall_score(truth, guess, average="micro"))
    assert found["exact"] == pytest.approx(accuracy_score(truth, guess))
    five = torch.zeros(200, 8).scatter(1, scores_TE.topk(5).indices, 1.0).numpy()
    assert found["recall_k2"] == pytest.approx(recall_score(truth, five, average="micro"))
    assert found["half"] == pytest.approx(float(((truth * guess).sum(1) >= 1.5).mean()))
    assert counts.curve()[-1] == 1.0


def test_no_expert_is_neither_guessed_nor_counted() -> None:
    counts = evaluate.Counts(6)
    counts.add(torch.arange(6.0).expand(2, 6), torch.tensor([[5, 6], [6, 6]]))
    assert (counts.chosen, counts.exact, counts.figures(2, 1)["slot_recall"]) == (1, 2, 1.0)


# The commands


def command(*args: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False)


def test_evaluate_leaves_out_prompts_that_a_predictor_was_trained_on(trace: Path, trained: dict[str, Path]) -> None:
    out = command("evaluate", trace, trained["head"], "--json")
    lines = {d["name"]: d for d in map(json.loads, out.stdout.splitlines())}
    seen = load_folder(trained["head"]).training.prompts
    held = 40 - len(seen)
    assert held == 4
    assert f"{len(seen)} of 40 prompts are left out" in out.stderr
    assert {d["rows"] for d in lines.values()} == {held * 24}


def test_evaluate_without_predictors_scores_all_untrained_ones_as_json(trace: Path) -> None:
    lines = [json.loads(line) for line in command("evaluate", trace, "--json").stdout.splitlines()]
    names = ["gate", "gate (lead 2)", "previous token", "oracle", "always wrong", "control (zero staleness)",
             "popularity (online)", "matching (online)"]  # fmt: skip
    assert [d["name"] for d in lines] == names
    for d in lines:
        assert set(d) >= {
            "name",
            "slot_recall",
            "exact",
            "half",
            "recall_k2",
            "us_per_call",
            "params",
            "ready",
            "layers",
        }
        assert all(0 <= d[key] <= 1 for key in ("slot_recall", "exact", "half", "recall_k2", "ready"))
        assert d["us_per_call"] > 0
    at = {d["name"]: d for d in lines}
    assert at["control (zero staleness)"]["slot_recall"] == at["oracle"]["exact"] == 1.0
    assert at["always wrong"]["recall_k2"] == 0.0
    assert at["gate"]["layers"] == [1, 2] and at["oracle"]["covers"] == [0, 1, 2]


def test_tables_and_pictures_name_every_predictor_and_domain(
    trace: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    out = command("evaluate", trace, *trained.values(), "--by-layer", "--plots", tmp_path, "--phase", "decode")
    for name in (*trained, "gate", "domain-0", "domain-1", "control"):
        assert name in out.stdout
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "recall_by_domain.png", "recall_by_guesses.png", "recall_by_layer.png", "recall_by_predictor.png",
    ]  # fmt: skip


def test_train_writes_a_folder_and_says_how_good_it_is(trace: Path, tmp_path: Path) -> None:
    out = command("train", trace, "-o", tmp_path / "p", "--kind", "popularity")
    assert "parameters" in out.stdout and "held out by prompt" in out.stdout
    assert load(tmp_path / "p").name == "popularity"
    for wrong in (["--kind", "magic"], ["--lead", "3"], ["--split", "day"], ["--validation", "0.9"], ["--epochs", "0"]):
        with pytest.raises(Refusal, match="E_OPTION"):
            command("train", trace, "-o", tmp_path / "q", *wrong)


# What is loaded is not trusted


def test_another_models_predictor_is_refused_with_both_fingerprints(trained: dict[str, Path]) -> None:
    with pytest.raises(Refusal, match=rf"E_PREDICTOR_MODEL.*{PRINT}.*{'cd' * 32}"):
        check_model(load(trained["head"]), "cd" * 32)
    check_model(load(trained["head"]), PRINT)


def test_damaged_folders_are_refused_in_one_line(trained: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in trained.items():
        about, tensors = json.loads((folder / ABOUT).read_text()), (folder / TENSORS).read_bytes()
        bad = tmp_path / kind
        bad.mkdir()

        def refused(text: bytes, data: bytes, bad: Path = bad) -> None:
            (bad / ABOUT).write_bytes(text)
            (bad / TENSORS).write_bytes(data)
            with pytest.raises(Refusal, match="E_PREDICTOR"):
                load(bad)

        good = json.dumps(about).encode()
        refused(good, tensors[: len(tensors) // 2])
        refused(good, b"")
        refused(good[:-30], tensors)
        refused(json.dumps(about | {"experts": [7, 6, 6]}).encode(), tensors)
        refused(json.dumps(about | {"version": 2}).encode(), tensors)
        refused(json.dumps(about | {"kind": "pickle"}).encode(), tensors)
        refused(json.dumps(about | {"fingerprint": None}).encode(), tensors)
        refused(good, (trained["mlp"] if kind != "mlp" else trained["head"]).joinpath(TENSORS).read_bytes())
        nan = bytearray(tensors)
        nan[-4:] = b"\xff" * 4
        refused(good, bytes(nan))
    with pytest.raises(Refusal, match=r"E_PREDICTOR.*no predictor.json"):
        load(tmp_path / "nothing")


def test_random_changes_are_refused_or_harmless(trained: dict[str, Path], stock_steps: Any, tmp_path: Path) -> None:
    rng = random.Random(7)
    bad = tmp_path / "bad"
    bad.mkdir()
    opened = 0
    for _ in range(300):
        folder = trained[rng.choice(sorted(trained))]
        about, tensors = json.loads((folder / ABOUT).read_text()), bytearray((folder / TENSORS).read_bytes())
        if rng.random() < 0.7:
            about = mutate_tree(rng, about)
        else:
            for _ in range(rng.choice((1, 3))):
                tensors[rng.randrange(min(len(tensors), 2000))] = rng.randrange(256)
        (bad / ABOUT).write_text(json.dumps(about), encoding="utf-8", errors="surrogatepass")
        (bad / TENSORS).write_bytes(tensors)
        try:
            predictor = load(bad)
        except Refusal as refusal:
            assert refusal.code == "E_PREDICTOR" and str(refusal).isprintable()
            continue
        opened += 1
        layers = [layer for layer in range(3) if predictor.when(layer) is not None]
        for layer in layers[-1:]:
            predictor.rank_rows(stock_steps[0][0], layer)
    assert opened < 200


def test_matching_finds_the_request_that_began_alike(stock_steps: Any) -> None:
    steps, _ = stock_steps
    predictor = TraceMatching(SHAPE)
    for step in steps[:5]:
        predictor.learn(step)
    scores_TE = predictor.rank_rows(steps[2], 2)
    assert torch.equal(scores_TE[-1], predictor.library_CLE[2, 2] * 2)
