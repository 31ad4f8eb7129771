"""Guesses cost time, never tokens; one that nobody began costs nothing; predictors see what the stock model computes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from guessers import Broken, Dice, Known
from safetensors.torch import save_file
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from duoserve.cache import ExpertCache
from duoserve.core import Key, Lane, Phase, Policy, Step, When
from duoserve.routers import load_routers, routers_as_file, routers_of

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}


def greedy(engine: Any, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their logits."""
    out = engine.model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY | more)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_tokens_and_logits_are_bit_identical_whatever_is_guessed(toy: Any, load: Any, family: str, format: str) -> None:
    ids = toys.ids(batch=1)
    for budget in ("min", "half"):
        engine = load(toy(family), budget=budget, format=format)
        n = engine.store.layers[0].n_experts
        known, wrong = Known(n), Known(n, wrong=True)
        engine.runtime.observers += [known.note, wrong.note]
        want, logits = greedy(engine, ids)
        engine.runtime.observers.clear()
        for predictor in (None, known, wrong, Dice(n), Dice(n, When.START), Dice(n, When.INPUT), Dice(n, lead=2)):
            engine.predict(predictor, always=predictor is not known)
            tokens, values = greedy(engine, ids)
            assert torch.equal(tokens, want) and torch.equal(values, logits), (budget, predictor)
            engine.runtime.cache.check()
        for policy in ("lru", "on-demand"):
            other = load(toy(family), budget=budget, format=format, policy=policy)
            tokens, values = greedy(other, ids)
            assert torch.equal(tokens, want) and torch.equal(values, logits), policy
            assert other.stats()["guesses"] == 0


def test_batches_are_guessed_for_too(toy: Any, load: Any) -> None:
    engine = load(toy("qwen3_moe", num_experts=16), budget="half")
    ids = toys.ids(batch=3)
    ids[1, :4], mask = 0, torch.ones_like(ids)
    mask[1, :4] = 0
    want, _ = greedy(engine, ids, attention_mask=mask)
    engine.predict(Dice(16), always=True)
    assert torch.equal(greedy(engine, ids, attention_mask=mask)[0], want)
    assert engine.stats()["prediction"]["rankings"] > 0


def test_an_oracle_turns_misses_into_hits(toy: Any, load: Any) -> None:
    """The link is fast and the toy slow, so that what is rightly guessed is there in time; half of the experts fit."""
    engine = load(toy("qwen3_moe"), budget="half")
    known = Known(6)
    engine.runtime.observers.append(known.note)
    greedy(engine, toys.ids(batch=1))
    engine.runtime.observers.clear()
    found = {}
    for name, predictor in (("none", None), ("known", known)):
        engine.predict(predictor, always=True)
        before = engine.runtime.transfer.counts()
        greedy(engine, toys.ids(batch=1))
        after = engine.runtime.transfer.counts()
        found[name] = after.misses - before.misses
        assert name == "none" or after.ready + after.late > 0
        assert name == "none" or after.wrong == before.wrong  # what was foreseen was needed
    assert found["known"] < found["none"], found


def test_a_predictor_that_fails_is_not_asked_again(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="min")
    want, _ = greedy(engine, toys.ids(batch=1))
    engine.predict(Broken(6), always=True)
    assert torch.equal(greedy(engine, toys.ids(batch=1))[0], want)
    stats = engine.stats()["prediction"]
    assert stats["predictor"] is None and "no such thing" in stats["error"]


def test_a_guess_that_nobody_began_is_withdrawn_and_its_slot_holds_what_it_held(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="half")
    greedy(engine, toys.ids(batch=1))
    transfer, cache, copy = engine.runtime.transfer, engine.runtime.cache, engine.device.copy
    go, held = threading.Event(), []
    for _ in range(2):  # both workers busy
        held.append(copy.submit(go.wait))
    while len(copy._running) < 2:
        pass
    before = {slot.index: (slot.key, slot.ready, transfer.slab(slot).clone()) for slot in cache.slots}
    counts, evictions = transfer.counts(), cache.evictions
    keys = cache.absent(1)[:2]
    guessed = [transfer.guess(key) for key in keys]
    assert all(guessed) and all(key in cache for key in keys)
    assert transfer.settle(1, ()) == (0, 2)
    go.set()
    for event in held:
        event.wait()
    after = {slot.index: (slot.key, slot.ready, transfer.slab(slot)) for slot in cache.slots}
    for index, (key, ready, bytes_) in before.items():
        assert after[index][:2] == (key, ready) and torch.equal(after[index][2], bytes_), index
    assert transfer.counts() == counts and cache.evictions == evictions
    cache.check()


def test_a_withdrawn_guess_leaves_an_empty_slot_empty_and_does_not_bring_back_what_came_elsewhere() -> None:
    cache = ExpertCache(2, [4, 4])
    slot = cache.claim(Key(0, 0))
    assert slot is not None
    cache.unpin(slot)
    cache.restore(slot, None, None, ())
    assert len(cache) == 0 and Key(0, 0) not in cache
    for expert in (1, 2):
        taken = cache.claim(Key(0, expert))
        assert taken is not None
        taken.ready = "there"
        cache.unpin(taken)
    first = cache.lookup(Key(0, 1))
    assert first is cache.claim(Key(1, 3))  # guessed over expert 1
    cache.unpin(first)
    again = cache.claim(Key(0, 1))  # which is wanted, and comes elsewhere
    assert again is not None and again is not first
    cache.unpin(again)
    cache.restore(first, Key(0, 1), "there", ())
    assert cache.lookup(Key(0, 1)) is again and len(cache) == 1
    cache.check()


def test_a_need_takes_a_slot_back_from_a_guess(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="min")
    transfer, cache = engine.runtime.transfer, engine.runtime.cache
    assert transfer.guess(Key(1, 0)) and transfer.guess(Key(1, 1))
    assert transfer.guess(Key(1, 2)) is None  # it would evict what the same layer is expected to need
    slots = [cache.claim(Key(2, e)) for e in (0, 1)]
    assert None not in slots
    for slot in slots:
        transfer.fetch(slot, Lane.DEMAND).ready.wait()
        transfer.abandon(slot)
    transfer.settle(1, ())
    assert Key(2, 0) in cache and Key(1, 0) not in cache
    cache.check()


class Looker(Dice):
    """Keeps what it is shown."""

    wants = frozenset({"hidden", "inputs"})

    def __init__(self, n_experts: int):
        super().__init__(n_experts, When.INPUT)
        self.steps: list[Step] = []
        self.followed: list[bool] = []

    def observe(self, step: Step) -> None:
        self.steps.append(step)
        self.followed.append(step.previous is not None)


@pytest.mark.parametrize("module, family", [(modeling_qwen3_moe, "qwen3_moe"), (modeling_mixtral, "mixtral")])
def test_predictors_see_what_the_stock_model_computes(toy: Any, load: Any, module: Any, family: str) -> None:
    folder, ids = toy(family), toys.ids(batch=1)
    engine = load(folder, budget="min", dtype="float32")
    looker = Looker(6)
    engine.predict(looker, always=True)
    tokens, _ = greedy(engine, ids)
    stock = toys.stock(folder)
    routed: list[Any] = []
    for layer in stock.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, args, out: routed.append((args[0].flatten(0, -2), out[2])))
    with torch.no_grad():
        out = stock(tokens[:, :-1], output_hidden_states=True)
    assert len(looker.steps) == GREEDY["max_new_tokens"]
    for layer, (hidden, chosen) in enumerate(routed):
        routes = [step.route(layer) for step in looker.steps]
        assert torch.equal(torch.cat([r.ids_TK for r in routes]).sort().values, chosen.sort().values)
        torch.testing.assert_close(torch.cat([r.hidden_TD for r in routes]), hidden, rtol=1e-4, atol=1e-4)
        seen = torch.cat(
            [step.inputs[layer] for step in looker.steps if step is looker.steps[-1] or layer in step.inputs]
        )
        wanted = out.hidden_states[layer][0]
        torch.testing.assert_close(seen, wanted[-seen.shape[0] :], rtol=1e-4, atol=1e-4)
    last = looker.steps[-1]
    assert last.previous is looker.steps[-2] and last.previous.previous is None
    assert looker.steps[0].previous is None and looker.steps[0].phase is Phase.PREFILL


def test_a_new_prompt_follows_nothing(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="min")
    looker = Looker(6)
    engine.predict(looker, always=True)
    greedy(engine, toys.ids(batch=1), max_new_tokens=3)
    greedy(engine, toys.ids(batch=2, seed=1), max_new_tokens=3)
    assert looker.followed == [False, True, True, False, True, True]


@pytest.mark.parametrize("family", sorted(toys.PROMISED))
def test_a_router_on_its_own_input_chooses_what_it_chose(toy: Any, load: Any, tmp_path: Path, family: str) -> None:
    engine = load(toy(family), budget="min", dtype="float32")
    looker = Looker(6)
    engine.predict(looker, always=True)
    greedy(engine, toys.ids(batch=4), max_new_tokens=8)
    tensors, about = routers_as_file(engine.routers())
    save_file(tensors, tmp_path / "routers.safetensors", about)
    routers = load_routers(tmp_path / "routers.safetensors")
    assert len(routers) == len(engine.store.layers)
    for step in looker.steps:
        for route in step.routes:
            router = routers[route.layer]
            assert router is not None and route.hidden_TD is not None
            k = route.ids_TK.shape[1]
            chosen = router.scores(route.hidden_TD).topk(k).indices
            assert torch.equal(chosen.sort().values, route.ids_TK.sort().values), (family, route.layer)


def test_routers_are_named_by_their_experts(toy: Any, load: Any) -> None:
    engine = load(toy("deepseek_v3"), budget="min")
    routers = routers_of(engine.model, [layer.module for layer in engine.store.layers])
    assert [r.weight_ED.shape[0] for r in routers if r is not None] == [8, 8]
    assert all(r is not None and r.sigmoid and r.groups == 2 and r.best == 1 for r in routers)


def test_lru_keeps_the_most_recent_and_one_by_one_waits(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="half", policy="lru")
    greedy(engine, toys.ids(batch=1))
    cache = engine.runtime.cache
    recent: list[Key] = []

    def note(step: Step) -> None:
        for route in step.routes:
            for expert in sorted(set(route.ids_TK.flatten().tolist())):
                key = Key(route.layer, expert)
                if key in recent:
                    recent.remove(key)
                recent.append(key)

    engine.runtime.observers.append(note)
    greedy(engine, toys.ids(batch=1, seed=3), max_new_tokens=40)
    slots = len(cache.slots)
    assert set(recent[-slots + 2 :]) <= set(cache.keys())  # the last layer's pair comes in one turn
    assert engine.runtime.policy is Policy.LRU
