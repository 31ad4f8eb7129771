"""The paper's machines as costs: what is published stands as printed, what is derived follows one rule, and nothing that is
no cost gets in.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dep_extension import testbeds
from dep_extension.cost import Line, Split, attention_s, expert_line, expert_s, link_s, shared_s
from dep_extension.partition import room

A, B, C, D = (testbeds.named(name) for name in "ABCD")
DEEPSEEK = testbeds.model("deepseek-v2", "A")
FIGURE_7 = {(1, 7): (0.10, 9.61e-7), (2, 6): (0.01, 1.28e-6), (4, 4): (0.37, 2.55e-6)}


def test_published_fits_stand_as_printed_in_milliseconds() -> None:
    assert (A.gemm.a, A.gemm.b) == pytest.approx((0.17e-3, 8.59e-14))
    assert (A.attention.a, A.attention.b) == pytest.approx((0.15e-3, 1.54e-14))
    for (ag, eg), (a, b) in FIGURE_7.items():
        assert tuple(A.link(Split(ag, eg))) == pytest.approx((a * 1e-3, b * 1e-3))


def test_a_derived_machine_is_slower_and_faster_by_its_data_sheet() -> None:
    assert B.gemm.b / A.gemm.b == pytest.approx(154.8 / 125) and B.gemm.a == A.gemm.a
    assert A.gemm.b < C.gemm.b < B.gemm.b and C.gemm == D.gemm
    for split in (Split(1, 7), Split(3, 5), Split(7, 1)):
        assert B.link(split) == A.link(split)
        assert C.link(split).b == pytest.approx(A.link(split).b * 31.5 / 450)
        assert D.link(Split(4 * split.ag, 4 * split.eg)) == pytest.approx(A.link(split))


def test_a_split_between_two_published_ones_lies_between_them() -> None:
    for part in Line._fields:
        two, three, four = (getattr(A.link(split), part) for split in (Split(2, 6), Split(3, 5), Split(4, 4)))
        assert three == pytest.approx((two + four) / 2)
    slopes = [A.link(Split(ag, 8 - ag)).b for ag in range(1, 8)]
    assert slopes == sorted(slopes)
    assert A.link(Split(1, 31)) == A.link(Split(1, 7))


def test_where_slopes_fall_none_beyond_is_below_the_nearest() -> None:
    falling = replace(A, links={Split(1, 3): Line(0, 3e-9), Split(2, 2): Line(0, 1e-9)})
    assert falling.link(Split(3, 1)).b == pytest.approx(1e-9) and falling.link(Split(1, 7)).b > 3e-9
    alone = replace(A, links={Split(2, 2): Line(1e-4, 1e-9)})
    assert alone.link(Split(1, 9)) == alone.link(Split(9, 1)) == Line(1e-4, 1e-9)


def test_only_milliseconds_fit_what_the_hardware_can_do() -> None:
    """Taken as seconds a card would multiply slower than a phone, as microseconds a hundred times its data sheet; the
    link's slope, one way to seven receivers, comes to about half of a PCIe 4.0 slot."""
    tflops = 2 / A.gemm.b / 1e12
    peak = 154.8
    assert peak / 10 < tflops < peak < tflops * 1e3 and tflops / 1e3 < peak / 1000
    sent = 7 * 2 / A.link(Split(1, 7)).b / 1e9
    assert 0.3 * 31.5 < sent < 31.5
    exposed = 2 * DEEPSEEK.layers * link_s(DEEPSEEK, A, Split(2, 6), 2 * 6 * 4096 / 160)
    assert exposed == pytest.approx(0.90549, rel=0.1)  # the paper's naive DEP, one sample of 4096 for each of two


def test_models_are_cut_to_the_layers_of_their_machine() -> None:
    layers = {name: [testbeds.model(name, bed).layers for bed in "ABCD"] for name in testbeds.models()}
    assert layers == {"deepseek-v2": [8, 4, 16, 16], "qwen3-235b-a22b": [24, 12, 48, 48]}
    assert DEEPSEEK.token_kv_bytes == 8 * 576 * 2
    for name in testbeds.models():
        for bed, split in (("A", Split(3, 5)), ("B", Split(4, 4)), ("C", Split(4, 4)), ("D", Split(8, 24))):
            assert room(testbeds.model(name, bed), testbeds.named(bed), split, 8192) is not None, (name, bed)


def test_what_a_token_keeps_is_what_its_cache_and_its_rows_are() -> None:
    whole = replace(DEEPSEEK, layers=60)
    assert whole.token_kv_bytes == pytest.approx(69_120)  # MLA keeps 576 elements of a token in a layer, 60 layers
    multi_head = replace(whole, kv_elements=None)
    assert whole.token_kv_bytes < 0.02 * multi_head.token_kv_bytes
    assert DEEPSEEK.token_waiting_bytes == (2 + 2 * 6) * 5120 * 2  # residual and normed, 6 rows each way
    assert DEEPSEEK.token_attending_bytes == 128 * (192 + 192 + 128 + 128) * 2  # q, k, v and the sum of values


def test_one_product_for_all_experts_is_launched_once() -> None:
    one = replace(A, experts=A.gemm)
    apart, together = (expert_line(DEEPSEEK, machine, 32) for machine in (A, one))
    assert apart.a == pytest.approx(3 * 32 * A.gemm.a) and together.a == pytest.approx(3 * A.gemm.a)
    assert apart.b == together.b == 3 * A.gemm.b * 5120 * 1536
    assert expert_s(DEEPSEEK, A, Split(3, 5), 10) - expert_s(DEEPSEEK, one, Split(3, 5), 10) == pytest.approx(
        3 * 31 * A.gemm.a
    )


def test_exact_projections_are_cheaper_than_multi_head_ones() -> None:
    for name in testbeds.models():
        paper, exact = (testbeds.model(name, "A", exact) for exact in (False, True))
        assert attention_s(exact, A, 1, 2048) < attention_s(paper, A, 1, 2048)
        assert exact.trunk_bytes < paper.trunk_bytes and shared_s(exact, A, 1, 64) == shared_s(paper, A, 1, 64)
        multi_head = 2 * paper.hidden * paper.heads * (paper.d_k + paper.d_v)
        assert paper.attention_weights == multi_head > exact.attention_weights


def test_every_constant_has_a_source_and_no_name_is_guessed() -> None:
    for name in testbeds.names():
        kind = "published" if name == "A" else "derived"
        assert testbeds.source(name).startswith(kind) and testbeds.named(name).source == testbeds.source(name)
    with pytest.raises(ValueError, match="no test bed is named 'E': there are A, B, C, D"):
        testbeds.named("E")
    with pytest.raises(ValueError, match="no model is named 'gpt': there are deepseek-v2, qwen3"):
        testbeds.model("gpt", "A")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gemm": Line(math.nan, 1)}, r"gemm.a of machine .* is nan, a cost is finite and at least 0"),
        ({"attention": Line(0, math.inf)}, "attention.b .* is inf"),
        ({"links": {Split(1, 1): Line(0, -1e-9)}}, r"link \(1, 1\).b .* is -1e-09"),
        ({"memory_bytes": 0}, "memory_bytes .* is 0, a cost is finite and at least 1"),
        ({"overlap": 0.5}, "overlap .* is 0.5"),
        ({"links": {}}, "8 GPUs and 0 links: two groups are at least 2 GPUs and 1 link"),
    ],
)
def test_what_is_no_cost_is_refused_in_one_line(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        replace(A, **change)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
