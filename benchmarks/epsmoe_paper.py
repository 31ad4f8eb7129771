"""What EPS-MoE printed (arXiv 2410.12247v2): tables as data, nothing of ours. Milliseconds of one layer, seconds to the
first token, per cent of gain. Which row of its headline table is which model follows from its other tables (Mixtral: 128 x
2048 tokens in 3.65 s, less 24.3 %; DBRX: 64 x 2048 in 3.32 s, less 30.5 %).
"""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """Of the ablation: rows per expert and output width of the product; its input width is 5120."""

    m: int
    o: int


class Row(NamedTuple):
    """`pn` stages; dense or grouped products; dispatch in FP8; SMs for products where they are limited."""

    pn: int
    dense: bool
    fp8: bool
    sm: int | None
    ms: tuple[float, ...]  # by COLUMNS


COLUMNS = tuple(Column(m, o) for m in (3072, 1024, 256) for o in (1536, 15360))
ABLATION_GPUS, ABLATION_INPUT = 4, 5120
ABLATION = (
    Row(1, False, False, 132, (5.698, 32.469, 2.120, 8.996, 1.032, 2.349)),
    Row(1, False, True, 132, (4.330, 30.980, 1.512, 8.516, 1.513, 2.203)),
    Row(1, True, False, None, (5.620, 21.247, 3.889, 7.497, 0.868, 2.708)),
    Row(5, False, False, 132, (4.837, 25.979, 1.790, 8.333, 0.683, 2.452)),
    Row(5, False, False, 116, (4.248, 26.270, 1.568, 8.808, 0.636, 2.461)),
    Row(5, False, True, 132, (3.728, 24.833, 1.418, 7.996, 0.607, 2.358)),
    Row(5, False, True, 116, (3.277, 25.928, 1.299, 8.697, 0.597, 2.398)),
    Row(5, True, False, None, (4.299, 20.203, 1.714, 7.128, 0.798, 2.598)),
    Row(5, True, True, None, (3.111, 19.795, 1.438, 6.895, 0.727, 2.549)),
    Row(20, True, False, None, (4.855, 20.599, 2.133, 7.043, 1.016, 2.655)),
    Row(20, True, True, None, (3.465, 20.012, 1.715, 6.893, 0.977, 2.619)),
)
SM_MS = {  # SMs left to products, by rows per expert
    3072: {132: 4.597, 124: 4.403, 116: 3.894, 108: 3.967, 100: 4.031, 92: 4.081},
    192: {132: 0.591, 124: 0.596, 116: 0.540, 108: 0.541, 100: 0.591, 92: 0.797},
}
SMALL_M = {1700: (0.869, 0.801), 1800: (0.995, 0.801), 1900: (1.032, 0.968), 2000: (1.054, 0.985), 2200: (1.124, 1.085)}
SMALL_M_GPUS = 8
THRESHOLD, E0, E1 = 1700, 0.32, 0.03
LENGTHS_V2 = (1024, 2048, 4096, 8192)
V2_GAIN = {1: (11.83, 11.02, 6.77, 5.13), 5: (21.81, 20.53, 16.89, 12.75), 20: (21.27, 18.05, 10.00, 11.60)}
V2_TOKENS_PER_S = 100e3  # the baseline's
MIXTRAL_BATCH, MIXTRAL_LENGTHS = 16, (2048, 4096, 8192, 16384)
MIXTRAL_TTFT_S = (0.46, 0.94, 1.94, 4.22)
MIXTRAL_LESS = {
    "TP+EP": (13.7, 9.5, 8.9, 8.3),
    "PN=1": (17.7, 18.9, 18.5, 15.7),
    "PN=2": (21.7, 22.7, 21.8, 17.7),
}
DBRX_BATCH, DBRX_LENGTH, DBRX_TTFT_S = 64, 2048, 3.32
DBRX_LESS = {"PN=1": (19.8, 26.1), "PN=2": (22.7, 30.5)}  # ranges over its cells; 30.5 is of this batch and length
DBRX_PRINTED_GAIN, DBRX_GAIN = 52.4, 44.0  # the printed one compares two operating points


class Network(NamedTuple):
    """As each model's publisher describes it. `tp`: attention is cut by heads (the others keep whole sequences)."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int
    gpus: int
    tp: bool
    attention_flops: int  # of a token for each token before it, both products, all heads, in multiplications


V2 = Network("DeepSeek-V2", 5120, 1536, 160, 6, 60, 8, False, 128 * (192 + 128))
MIXTRAL = Network("Mixtral-8x7B", 4096, 14336, 8, 2, 32, 4, True, 32 * 2 * 128)
DBRX = Network("DBRX", 6144, 10752, 16, 4, 40, 8, True, 48 * 2 * 128)
