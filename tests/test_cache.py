"""The pool's book-keeping, without bytes or threads."""

from __future__ import annotations

import random

import pytest

from duoserve.cache import ExpertCache
from duoserve.core import Key


def claimed(cache: ExpertCache, *experts: int) -> list:
    slots = []
    for e in experts:
        slots.append(cache.claim(Key(0, e)))
        cache.unpin(slots[-1])
    return slots


def test_least_recently_wanted_goes_first() -> None:
    cache = ExpertCache(3)
    slots = claimed(cache, 0, 1, 2)
    cache.keep(slots[0])
    claimed(cache, 3)
    assert Key(0, 1) not in cache and Key(0, 0) in cache


def test_spent_goes_before_everything_else() -> None:
    cache = ExpertCache(3)
    slots = claimed(cache, 0, 1, 2)
    cache.spend(slots[2])
    claimed(cache, 3)
    assert Key(0, 2) not in cache and Key(0, 0) in cache


def test_evicting_never_touches_a_pinned_slot() -> None:
    cache = ExpertCache(2)
    a, b = claimed(cache, 0, 1)
    cache.pin(a)
    claimed(cache, 2)
    assert Key(0, 0) in cache and Key(0, 1) not in cache
    cache.pin(b)
    assert cache.claim(Key(0, 3)) is None


def test_a_guess_is_offered_free_and_spent_slots_only() -> None:
    cache = ExpertCache(2)
    (a,) = claimed(cache, 0)
    assert cache.spare() is not None
    claimed(cache, 1)
    assert cache.spare() is None
    cache.spend(a)
    assert cache.spare() is a
    cache.pin(a)
    assert cache.spare() is None


def test_forgotten_slots_are_free_again() -> None:
    cache = ExpertCache(1)
    slot = cache.claim(Key(0, 0))
    cache.forget(slot)
    assert len(cache) == 0 and cache.claim(Key(0, 1)) is slot


@pytest.mark.parametrize("seed", range(5))
def test_random_histories_agree_with_a_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    cache, order = ExpertCache(8), []  # `order`: our keys, first to go first
    for _ in range(2000):
        key = Key(rng.randrange(4), rng.randrange(8))
        slot = cache.lookup(key)
        if slot is None:
            slot = cache.claim(key)
            cache.unpin(slot)
            order = order[1:] if len(order) == 8 else order
        else:
            order.remove(key)
        if rng.random() < 0.3:
            cache.spend(slot)
            order.insert(0, key)
        else:
            cache.keep(slot)
            order.append(key)
        assert list(cache.keys()) == order
    cache.check()
