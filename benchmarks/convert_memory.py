"""Peak anonymous memory of a conversion, against its promise: 1 GiB plus the largest trunk tensor.

    python -m benchmarks.convert_memory CHECKPOINT [--format int4]

The conversion runs as the command a user types; /proc is read every 5 ms. File-backed pages (the mapped checkpoint) are
the kernel's to drop and do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe

GIB = 1 << 30


def peak_anonymous(command: list[str]) -> tuple[int, float]:
    """Bytes and seconds."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.005)
    if process.wait():
        sys.exit(f"conversion failed with exit code {process.returncode}")
    return peak, time.perf_counter() - began


def largest_trunk_tensor(checkpoint: Path) -> int:
    from duoserve.checkpoint import Checkpoint
    from duoserve.store import Entry

    return max(Entry(n, dtype, shape, lambda: []).n_bytes for n, dtype, shape in Checkpoint(checkpoint).trunk())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--format", default="int4")
    options = parser.parse_args()
    out = Path(tempfile.mkdtemp(dir=options.checkpoint.parent))
    try:
        command = [sys.executable, "-m", "duoserve.cli", "convert", os.fspath(options.checkpoint), "-o", os.fspath(out)]
        peak, seconds = peak_anonymous([*command, "--format", options.format])
        written = sum(file.stat().st_size for file in out.iterdir())
    finally:
        shutil.rmtree(out)
    promise = GIB + largest_trunk_tensor(options.checkpoint)
    read = sum(file.stat().st_size for file in options.checkpoint.glob("*.safetensors"))
    print(f"{options.format}: {read / GIB:.2f} GiB read, {written / GIB:.2f} GiB written in {seconds:.0f} s")
    print(f"peak anonymous memory {peak / GIB:.3f} GiB of {promise / GIB:.3f} GiB promised")
    found = {"benchmark": "convert_memory", "format": options.format, "checkpoint_bytes": read, "store_bytes": written}
    found |= {"seconds": seconds, "peak_anonymous_bytes": peak, "promise_bytes": promise, "machine": describe()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
