"""The pool's book-keeping, without bytes or threads."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from duoserve.cache import DECAY, TIE, ExpertCache, Keep, Slot
from duoserve.core import Key


def want(cache: ExpertCache, layer: int, *experts: int) -> int:
    """One token through one layer; returns how many of its experts were there."""
    cache.turn(layer, 1, dict.fromkeys(experts, 1))
    keys = [Key(layer, e) for e in experts]
    held = [slot for key in keys if (slot := cache.lookup(key)) is not None]
    for slot in held:
        cache.pin(slot)
    claimed = [cache.claim(key) for key in keys if key not in cache]
    for slot in (*held, *claimed):
        assert slot is not None
        cache.unpin(slot)
    return len(held)


def filled(n_slots: int, experts: list[int]) -> tuple[ExpertCache, list[Slot]]:
    cache = ExpertCache(n_slots, experts)
    for e in range(n_slots):
        want(cache, 0, e)
    return cache, [cache.lookup(Key(0, e)) for e in range(n_slots)]  # type: ignore[misc]


def test_of_one_layer_the_longest_unwanted_goes_first() -> None:
    cache, _ = filled(3, [8])
    want(cache, 0, 0)
    want(cache, 0, 3)
    assert set(cache.keys()) == {Key(0, 0), Key(0, 2), Key(0, 3)}


def test_often_wanted_outlives_just_wanted() -> None:
    cache = ExpertCache(2, [8])
    for _ in range(3):
        want(cache, 0, 0)
    want(cache, 0, 1)
    want(cache, 0, 2)
    assert set(cache.keys()) == {Key(0, 0), Key(0, 2)}


def test_other_layers_tokens_do_not_age_an_expert() -> None:
    cache = ExpertCache(3, [4, 4])
    want(cache, 1, 0)
    for e in (0, 1, 2, 3, 0, 1):
        want(cache, 0, e)
    assert Key(1, 0) in cache, "its own layer has not passed it over yet"


def test_evicting_never_touches_a_pinned_slot() -> None:
    cache, (a, b) = filled(2, [8])
    cache.pin(a)
    want(cache, 0, 2)
    assert Key(0, 0) in cache and Key(0, 1) not in cache
    cache.pin(b)
    assert cache.claim(Key(0, 3)) is None and cache.offer() is None


def test_a_guess_evicts_nothing_of_the_layer_it_is_for() -> None:
    cache, _ = filled(2, [4, 4])
    assert cache.claim(Key(0, 3), sparing=0) is None
    slot = cache.claim(Key(1, 0), sparing=1)
    assert slot is not None and len(cache) == 2


def test_a_prompt_counts_as_its_tokens_one_by_one_would() -> None:
    once, each = ExpertCache(4, [4]), ExpertCache(4, [4])
    once.turn(0, 40, {0: 30, 1: 10})
    for i in range(40):
        each.turn(0, 1, {1 if i % 4 == 3 else 0: 1})
    assert once._worth[:2] == pytest.approx(each._worth[:2], rel=0.2)
    assert once._worth.sum() == pytest.approx((1 - DECAY**40) / (1 - DECAY))


def test_forgotten_slots_are_free_again() -> None:
    cache, (slot,) = filled(1, [4])
    cache.forget(slot)
    assert len(cache) == 0 and cache.claim(Key(0, 1)) is slot


def lru_hits(tokens: list[list[list[int]]], n_slots: int) -> int:
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for token in tokens:
        for layer, experts in enumerate(token):
            for e in experts:
                hits += (layer, e) in held
                held[(layer, e)] = None
                held.move_to_end((layer, e))
                if len(held) > n_slots:
                    held.popitem(last=False)
    return hits


@pytest.mark.parametrize("n_slots", [10, 26, 64])
def test_uniform_routes_hit_as_often_as_residency_where_lru_does_not(n_slots: int) -> None:
    """16 layers of 8 experts, two each: a token wants 32, and LRU with less room than that hits nothing."""
    rng = random.Random(0)
    tokens = [[rng.sample(range(8), 2) for _ in range(16)] for _ in range(400)]
    cache = ExpertCache(n_slots, [8] * 16)
    hits = sum(want(cache, layer, *experts) for token in tokens for layer, experts in enumerate(token))
    asked = 400 * 32
    assert hits / asked > 0.7 * n_slots / 128
    assert hits >= lru_hits(tokens, n_slots)
    cache.check()


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_agree_with_a_plain_model(seed: int) -> None:
    """The same rule, written with dictionaries and no arrays."""
    rng = random.Random(seed)
    layers, experts = 3, 5
    cache = ExpertCache(6, [experts] * layers)
    worth = {Key(layer, e): 0.0 for layer in range(layers) for e in range(experts)}
    held: set[Key] = set()
    for step in range(600):
        layer = step % layers
        wanted = rng.sample(range(experts), 2)
        for key in worth:
            if key.layer == layer:
                worth[key] = worth[key] * DECAY + (key.expert in wanted)
        keys = [Key(layer, e) for e in wanted]
        for key in keys:
            if key not in held:
                if len(held) == 6:
                    least = {k: worth[k] - TIE * ((k.layer - layer - 1) % layers) for k in sorted(held - set(keys))}
                    held.remove(min(least, key=least.__getitem__))
                held.add(key)
        want(cache, layer, *wanted)
        assert set(cache.keys()) == held
    cache.check()


@pytest.mark.parametrize("keep", [Keep.WORTH, Keep.RECENT])
def test_a_view_says_what_is_here_pinned_and_wanted(keep: Keep) -> None:
    cache = ExpertCache(4, [3, 5], keep)
    for _ in range(40):
        want(cache, 0, 1)
        want(cache, 1, 2)
    want(cache, 1, 4)
    pinned = cache.lookup(Key(1, 2))
    assert pinned is not None
    cache.pin(pinned)
    view = cache.view()
    assert view.resident.nonzero()[0].tolist() == [1, 5, 7] and view.pinned.nonzero()[0].tolist() == [5]
    assert view.turn == 1 and view.heat[[0, 2, 3]].tolist() == [0, 0, 0]
    assert view.heat[1] > 0.85 and 0.8 < view.heat[5] < 1 and 0 < view.heat[7] <= 1
    cache.unpin(pinned)
    assert not cache.view().pinned.any()
