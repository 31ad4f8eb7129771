"""Writes duoserve/machines/*.json: profiles of machines nobody here has, from data sheets and from others' measurements.

    python scripts/machines.py

Every figure is a published one times an efficiency, both named in the source line of its part. None was measured by this
project: where it says "estimate", it is ours. What holds for all of them stands once, in the constants below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from duoserve.profile import Attention, DiskRate, Launch, Link, Profile, write_profile

MEMORY_SHARE = 0.85  # of the data sheet: copies inside an RTX 4090 reach 0.91, inside an RTX 5090 0.86 of it
PRODUCT_SHARE = 0.6  # of the dense tensor rate, in products as small as an expert's
READ_SHARE = 0.8  # of the data sheet's bandwidth, in a product that is bound by reading its weights
BITS = {"bf16": 16.0, "float32": 32.0, "fp8": 8.0, "int4": 4.5, "nf4": 4.5}
UNPACKED_FROM = 32  # rows from which four bits (and FP8 where the tensor cores lack it) are unpacked to bf16 first
ROWS = (1, 4, 16, 31, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)
LAUNCH = Launch(4e-6, 150e-6, 40e-6)

MEMORY = (
    "x 0.85, as device copies reach (0.91 on an RTX 4090: tinygrad/open-gpu-kernel-modules #6; 0.86 on an RTX 5090: "
    "aikitoria/open-gpu-kernel-modules #9)"
)
MATRIX = (
    "estimate: the larger of reading the weights at 0.8 of the data sheet's bandwidth and multiplying at 0.6 of its dense "
    "tensor rate{fp8}; from 32 rows on formats without tensor cores are unpacked to bf16 first, four bytes a weight. Large "
    "products reach more: 1.0 on an RTX 4090 (mli/transformers-benchmarks #4), 0.85-1.1 on an RTX 5090 "
    "(zzc0721/torch-performance-test-data #200, #15). Rate: {rate}"
)
ATTENTION = (
    "estimate: one query reads a byte per FLOP at half the bandwidth; a prompt multiplies at 0.35 of the tensor rate"
)
LAUNCHES = (
    "estimate, alike for all machines: 4 us an operation of a stock eager model (views about 1, kernel launches 5 to 8), "
    "150 us for a MoE layer's route read and grouping, 40 us of host time for an expert's products"
)
DISK = "estimate: a PCIe 4.0 NVMe drive's 7 GB/s x 0.85, two readers; one reader 0.7 of that"
PAGEABLE = (
    "pageable: 9.6 GB/s for expert-sized copies on an RTX 5090 where pinned gave 32 (kekzl/imp #1409), taken as 10 "
    "everywhere: the driver stages them with one host thread"
)


class Card(NamedTuple):
    file: str
    name: str
    bandwidth: float  # bytes/s, data sheet
    tensor: float  # bf16 FLOP/s, dense, float32 sums
    fp8: float | None  # FLOP/s, dense
    pinned: float  # bytes/s
    bandwidth_source: str
    tensor_source: str
    link_source: str


PCIE4 = "PCIe 4.0 x16: 24 to 26 GB/s pinned, measured on RTX 4090 (NVIDIA/nvbandwidth #15) and between A6000 (#50); "
PCIE5 = "PCIe 5.0 x16: 56 GB/s pinned, measured on RTX 5090 (tinygrad/open-gpu-kernel-modules #29); "
CARDS = (
    Card("a5000", "NVIDIA RTX A5000 24 GB, Threadripper PRO 3945WX, PCIe 4.0 (DuoServe-MoE, table of test beds)",
         768e9, 111.1e12, None, 25e9, "data sheet 768 GB/s",
         "data sheet 222.2 TFLOPS sparse, 111.1 dense", PCIE4),
    Card("a6000", "NVIDIA RTX A6000 48 GB, Threadripper PRO 5955WX, PCIe 4.0 (DuoServe-MoE, table of test beds)",
         768e9, 154.8e12, None, 25e9, "data sheet 768 GB/s",
         "data sheet 309.7 TFLOPS sparse, 154.8 dense", PCIE4),
    Card("rtx4090", "NVIDIA GeForce RTX 4090 24 GB, PCIe 4.0",
         1008e9, 165.2e12, 330.3e12, 25e9, "data sheet 1008 GB/s",
         "Ada white paper 165.2 TFLOPS dense with float32 sums, FP8 330.3", PCIE4),
    Card("rtx5090", "NVIDIA GeForce RTX 5090 32 GB, PCIe 5.0",
         1792e9, 209.5e12, 419e12, 55e9, "data sheet 1792 GB/s",
         "Blackwell white paper 209.5 TFLOPS dense with float32 sums, FP8 419", PCIE5),
    Card("h200", "NVIDIA H200 141 GB, PCIe 5.0",
         4800e9, 989.5e12, 1979e12, 55e9, "data sheet 4.8 TB/s",
         "data sheet 1979 TFLOPS sparse, 989.5 dense, FP8 1979 dense", PCIE5),
)  # fmt: skip


def profile(card: Card) -> Profile:
    fp8 = "" if card.fp8 else ", FP8 unpacked as well"
    return Profile(
        device="cuda",
        machine={"gpu": card.name},
        disk=(DiskRate(1 << 20, 1, 4.2e9), DiskRate(1 << 20, 2, 6e9)),
        memory=MEMORY_SHARE * card.bandwidth,
        matrix={format: tuple((rows, _weight_s(card, format, rows)) for rows in ROWS) for format in BITS},
        attention=Attention(0.5 * card.bandwidth, 0.35 * card.tensor),
        warm=LAUNCH,
        cold=LAUNCH,
        link=Link(card.pinned, 10e9),
        sources={
            "disk": DISK,
            "memory": f"{card.bandwidth_source} {MEMORY}",
            "matrix": MATRIX.format(fp8=fp8, rate=card.tensor_source),
            "attention": ATTENTION,
            "launch": LAUNCHES,
            "link": card.link_source + PAGEABLE,
        },
    )


def _weight_s(card: Card, format: str, rows: int) -> float:
    """Seconds per weight of a product with `rows` rows, two digits more than any of these figures deserves."""
    native = format in ("bf16", "float32") or (format == "fp8" and card.fp8 is not None)
    unpacking = 0.0 if native or rows < UNPACKED_FROM else 4 / (READ_SHARE * card.bandwidth)
    rate = card.fp8 if format == "fp8" and card.fp8 is not None else card.tensor / (2 if format == "float32" else 1)
    reading = BITS[format] / 8 / (READ_SHARE * card.bandwidth)
    return float(f"{unpacking + max(reading, 2 * rows / (PRODUCT_SHARE * rate)):.4g}")


def main() -> None:
    folder = Path(__file__).parent.parent / "duoserve" / "machines"
    folder.mkdir(exist_ok=True)
    for card in CARDS:
        write_profile(folder / f"{card.file}.json", profile(card))
        print(json.dumps({"machine": card.file, "link": card.pinned, "memory": MEMORY_SHARE * card.bandwidth}))


if __name__ == "__main__":
    main()
