"""Machine profiles: read back as written, whatever is broken refused in one line; and the estimate's arithmetic by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from duoserve.core import Refusal
from duoserve.estimate import COPIES, LayerNeeds, Needs, Product, Shares, estimate
from duoserve.profile import MAX_BYTES, Attention, DiskRate, Launch, Link, Profile, read_profile, write_profile

MACHINE = Profile(
    device="cpu",
    machine={"cpu": "a test"},
    disk=(DiskRate(1 << 20, 1, 1e9), DiskRate(4 << 20, 1, 4e9), DiskRate(1 << 20, 2, 2e9), DiskRate(4 << 20, 2, 4e9)),
    memory=20e9,
    matrix={"bf16": ((1, 1e-10), (100, 1e-9)), "int4": ((1, 2e-11), (100, 4e-9))},
    attention=Attention(5e9, 100e9),
    warm=Launch(1e-6, 5e-5, 1e-5),
    cold=Launch(2e-6, 1e-4, 2e-5),
    link=None,
    sources=dict.fromkeys(("disk", "memory", "matrix", "attention", "launch"), "made up for a test"),
)
LAYER = LayerNeeds(experts=8, choices=2, slab_bytes=4 << 20, weights=7_000_000)
NEEDS = Needs(
    layers=(LAYER,) * 4,
    expert_format="int4",
    trunk=(Product("bf16", 10_000_000, False), Product("bf16", 5_000_000, True)),
    trunk_bytes=30_000_000,
    kv_bytes=1_000_000,
    ops=1000,
    context=100,
    token_attention_flops=10_000_000,
    prompt_attention_flops=1_000_000_000,
)
GPU = replace(
    MACHINE, device="cuda", memory=2e12, link=Link(16e9, 6e9), sources=MACHINE.sources | {"link": "made up for a test"}
)


@pytest.mark.parametrize("profile", [MACHINE, GPU], ids=["cpu", "cuda"])
def test_a_profile_is_read_back_as_written(tmp_path: Path, profile: Profile) -> None:
    write_profile(tmp_path / "machine.json", profile)
    assert read_profile(tmp_path / "machine.json") == profile


def broken() -> dict[str, Any]:
    good = MACHINE.to_json()
    return {
        "not JSON": b"{",
        "not UTF-8": b"\xff\xfe{}",
        "not an object": b"[1]",
        "too deep": b"[" * 30_000,
        "too long": b" " * (MAX_BYTES + 1),
        "another version": good | {"version": 2},
        "another kind": good | {"kind": "expert-store"},
        "something more": good | {"code": "x"},
        "something less": {k: v for k, v in good.items() if k != "memory"},
        "no disk rates": good | {"disk": {"source": "x", "rates": []}},
        "too many disk rates": good | {"disk": {"source": "x", "rates": [[1 << 20, 1, 1e9]] * 65}},
        "a rate of none": good | {"memory": {"source": "x", "bytes_per_s": 0}},
        "a negative rate": good | {"memory": {"source": "x", "bytes_per_s": -1e9}},
        "a rate beyond reason": good | {"memory": {"source": "x", "bytes_per_s": 1e300}},
        "not a number": good | {"memory": {"source": "x", "bytes_per_s": float("nan")}},
        "a truth for a number": good | {"memory": {"source": "x", "bytes_per_s": True}},
        "rows that do not rise": good
        | {"matrix": {"source": "x", "seconds_per_weight": {"bf16": [[2, 1e-9], [1, 1e-9]]}}},
        "a source that is no text": good | {"memory": {"source": 7, "bytes_per_s": 1e9}},
        "control characters": good | {"machine": {"cpu": "a\x1b[2J"}},
        "a long integer": b'{"kind": ' + b"9" * 10_000 + b"}",
    }


@pytest.mark.parametrize("what", broken())
def test_a_broken_profile_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    data = broken()[what]
    (tmp_path / "machine.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(Refusal, match=r"E_PROFILE: .*; run `duoserve doctor` again") as refusal:
        read_profile(tmp_path / "machine.json")
    assert refusal.value.status == 5 and "\n" not in str(refusal.value)


def test_mutated_profiles_are_refused_or_whole(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw, whole, path = random.Random(seed), json.dumps(GPU.to_json()).encode(), tmp_path / "machine.json"
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            found = read_profile(path)
            assert estimate(NEEDS, Shares(0.5, 0, 0.5), replace(found, matrix=MACHINE.matrix)).token_s > 0
        except Refusal as refusal:
            refused += 1
            assert refusal.code == "E_PROFILE" and "\n" not in str(refusal)
    assert refused > 1000


def test_rates_lie_between_their_neighbours() -> None:
    assert MACHINE.disk_rate(1 << 20, 1) == 1e9 and MACHINE.disk_rate(4 << 20, 1) == 4e9
    assert MACHINE.disk_rate(2 << 20, 1) == pytest.approx(2e9)  # half way in logarithms
    assert MACHINE.disk_rate(1, 1) == 1e9 and MACHINE.disk_rate(1 << 30, 8) == 4e9
    assert MACHINE.weight_s("bf16", 10) == pytest.approx(10**-9.5)
    assert MACHINE.weight_s("float16", 1) == MACHINE.weight_s("bf16", 1) and not MACHINE.knows("nf4")


def test_a_resident_token_is_its_products_and_operations() -> None:
    e = estimate(NEEDS, Shares(1, 0, 0), MACHINE)
    products = 15_000_000 * 1e-10 + 4 * 2 * 7_000_000 * 2e-11
    operations = 1000 * 2e-6 + 4 * 1e-4 + 4 * 2 * 2e-5
    attention = 10_000_000 / 5e9 + COPIES * 1_000_000 / 20e9
    assert e.token_s == e.resident_s == pytest.approx(products + operations + attention)
    assert e.misses == e.missed_bytes == e.prompt_stream_s == 0
    assert e.token_bytes == 30_000_000 + 4 * 2 * (4 << 20) + 1_000_000
    assert e.limit_s == pytest.approx(e.token_bytes / 20e9) and e.limited_by == "memory"


def test_a_token_with_nothing_resident_waits_for_every_slab() -> None:
    e = estimate(NEEDS, Shares(0, 0, 1), MACHINE)
    assert e.misses == 8 and e.missed_bytes == 8 * (4 << 20)
    assert e.token_s == pytest.approx(e.resident_s + e.missed_bytes / 4e9)
    assert e.limit_s == pytest.approx(e.missed_bytes / 4e9) and e.limited_by == "disk"


def test_half_resident_reads_overlap_the_resident_expert() -> None:
    """Two of eight chosen, half resident: none, one, two absent with chances 1/4, 1/2, 1/4."""
    e = estimate(NEEDS, Shares(0.5, 0, 0.5), MACHINE)
    expert, read = 7_000_000 * 2e-11 + 2e-5, (4 << 20) / 4e9
    layer = 0.25 * 2 * expert + 0.5 * (max(read, expert) + expert) + 0.25 * (2 * read + 2 * expert)
    assert e.token_s == pytest.approx(e.resident_s + 4 * (layer - 2 * expert))


def test_a_prompt_takes_the_larger_of_compute_and_stream() -> None:
    fast, slow = Shares(1, 0, 0), Shares(0, 0, 1)
    slow_disk = replace(MACHINE, disk=(DiskRate(4 << 20, 1, 1e7),))
    stream = estimate(NEEDS, slow, slow_disk).prompt_stream_s
    assert stream == pytest.approx(4 * 8 * (4 << 20) / 1e7, rel=1e-6)  # 100 tokens touch every expert
    assert estimate(NEEDS, slow, slow_disk).prompt_s == stream > estimate(NEEDS, fast, slow_disk).prompt_s


def test_more_slots_are_never_slower_and_nothing_beats_the_limit() -> None:
    for machine in (MACHINE, GPU):
        found = [estimate(NEEDS, Shares(s / 8, 0, 1 - s / 8), machine) for s in range(9)]
        assert all(a.token_s >= b.token_s for a, b in pairwise(found))
        assert all(e.limit_s <= e.low_s <= e.token_s for e in found)


def test_host_memory_spares_the_disk() -> None:
    disk, host = (estimate(NEEDS, shares, GPU) for shares in (Shares(0.25, 0, 0.75), Shares(0.25, 0.75, 0)))
    assert host.token_s < disk.token_s and host.limited_by == "link"
    assert host.limit_s == pytest.approx(host.missed_bytes / 16e9)
