"""Which expert rank holds what: everything is somewhere, evenly, so often as was asked, and again after ranks are lost."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dep_extension.partition import shares, shares_after


def cases(n: int, seed: int) -> list[tuple[int, int, int]]:
    """(experts, ranks, replicas) of any kind, more ranks than experts included."""
    rng = random.Random(seed)
    drawn = ((rng.randint(1, 40), rng.randint(1, 12)) for _ in range(n))
    return [(experts, ranks, rng.randint(1, ranks)) for experts, ranks in drawn]


def counted(held: tuple[tuple[int, ...], ...]) -> Counter[int]:
    return Counter(expert for one in held for expert in one)


def test_every_expert_is_on_as_many_ranks_as_asked_and_ranks_are_even() -> None:
    for experts, ranks, replicas in cases(2000, seed=1):
        held = shares(experts, ranks, replicas)
        assert len(held) == ranks
        assert counted(held) == dict.fromkeys(range(experts), replicas)
        assert all(list(one) == sorted(set(one)) for one in held), "rising, none twice on a rank"
        assert max(map(len, held)) - min(map(len, held)) <= 1


def test_without_replicas_a_share_is_a_run_of_ids_in_order_of_ranks() -> None:
    for experts, ranks, _ in cases(500, seed=2):
        assert [e for one in shares(experts, ranks) for e in one] == list(range(experts))
    assert shares(8, 3) == ((0, 1), (2, 3, 4), (5, 6, 7))
    assert shares(8, 3, 2) == ((0, 1, 2, 3, 4), (0, 1, 5, 6, 7), (2, 3, 4, 5, 6, 7))
    assert shares(2, 4) == ((), (0,), (), (1,))


def test_survivors_keep_what_they_had_and_nothing_is_lost() -> None:
    rng = random.Random(3)
    for experts, ranks, replicas in cases(2000, seed=4):
        if ranks == 1:
            continue
        held, gone = shares(experts, ranks, replicas), rng.sample(range(ranks), rng.randint(0, ranks - 1))
        left = [one for rank, one in enumerate(held) if rank not in gone]
        after = shares_after(held, gone)
        assert len(after) == len(left)
        assert all(
            set(before) <= set(now) and list(now) == sorted(set(now)) for before, now in zip(left, after, strict=True)
        )
        assert set(counted(after)) == set(range(experts))
        taken = [len(now) - len(before) for before, now in zip(left, after, strict=True)]
        assert sum(taken) == experts - len({e for one in left for e in one}), "only what nobody held was taken over"
        if replicas > len(gone):
            assert sum(taken) == 0
        fullest_taker = max((len(now) for now, more in zip(after, taken, strict=True) if more), default=0)
        assert fullest_taker <= min(map(len, after)) + 1, "the least loaded took it"


def test_shares_after_several_losses_are_those_after_one_more() -> None:
    once = shares_after(shares(9, 3), [1])
    assert once == ((0, 1, 2, 3, 5), (4, 6, 7, 8))
    assert shares_after(once, [0]) == ((0, 1, 2, 3, 4, 5, 6, 7, 8),)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: shares(0, 4), "0 experts on 4 ranks"),
        (lambda: shares(4, 0), "4 experts on 0 ranks"),
        (lambda: shares(8, 2, 3), "3 replicas of each expert on 2 ranks: ask for 1 to 2"),
        (lambda: shares(8, 2, 0), "0 replicas"),
        (lambda: shares_after(shares(8, 2), [0, 1]), "2 of 2 expert ranks are lost, 0 are left"),
        (lambda: shares_after(shares(8, 2), [2]), "rank 2 is lost of 2 expert ranks"),
    ],
)
def test_impossible_shares_are_refused_in_one_line(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        call()  # type: ignore[operator]
    assert len(str(raised.value).splitlines()) == 1
