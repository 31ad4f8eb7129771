"""What files say of themselves, read within bounds: JSON, and the headers of safetensors files. Knows sizes and types;
knows nothing of what the names mean. Imports no torch.

Everything here may come from a stranger. Lengths are checked before anything is read, and the number of values before
anything is parsed: a JSON text of 4 MiB can otherwise become 100 MiB of objects.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, NamedTuple

from duoserve.core import Refusal

MAX_HEADER = 16 << 20  # bytes; a shard with 100,000 tensors needs 12 MiB
MAX_TENSORS = 32_768  # in a file that is ours
MAX_JSON, MAX_VALUES = 16 << 20, 400_000
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
_MAX_SIDES, _MAX_SIDE = 8, 1 << 40
_SHOWN = 80  # characters of a stranger's text in a message


class Extent(NamedTuple):
    """Where a tensor's bytes lie in its file, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """Of a safetensors file: its tensors by name, and at which byte of the file their data begins."""

    tensors: dict[str, Extent]
    data_offset: int


def shown(value: object) -> str:
    """A stranger's value in a message: on one line, and short."""
    text = reprlib.repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def bounded_json(text: bytes, where: object, remedy: str, max_values: int = MAX_VALUES) -> Any:
    """Parse, or raise Refusal: too many values, no JSON, nested too deep, a name given twice, a number that is none."""
    n = text.count(b",") + text.count(b"[") + text.count(b"{")
    if n > max_values:
        raise _refusal(where, f"holds {n:,} values, at most {max_values:,} are read", remedy)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as error:
        raise _refusal(where, "is nested too deep to be read", remedy) from error
    except ValueError as error:  # also text that is no UTF-8, and integers of thousands of digits
        raise _refusal(where, f"is not JSON ({shown(str(error))[1:-1]})", remedy) from error


def read_json(path: Path, remedy: str, max_bytes: int = MAX_JSON, max_values: int = MAX_VALUES) -> Any:
    """The JSON in a file, once its length is known to be within bounds."""
    have = regular_size(path)
    if have < 0:
        raise _refusal(path, "is missing or no plain file", remedy)
    if have > max_bytes:
        raise _refusal(path, f"has {have:,} bytes, at most {max_bytes:,} are read", remedy)
    return bounded_json(path.read_bytes(), path, remedy, max_values)


def regular_size(path: Path) -> int:
    """Bytes of a plain file; -1 for all else (pipes and devices could be waited for without end)."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def header_text(path: Path, remedy: str) -> bytes:
    """The header of a safetensors file as it stands there; its length is checked against the file first."""
    have = regular_size(path)
    if have < 8:
        raise _refusal(path, f"has {max(have, 0)} bytes, a safetensors file has at least 8", remedy)
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if n > min(MAX_HEADER, have - 8):
            what = f"has {have:,} bytes, its header says it is {n:,} long (at most {MAX_HEADER:,} are read)"
            raise _refusal(path, what, remedy)
        return file.read(n)


def check_bounds(path: Path, remedy: str) -> None:
    """Refuse a safetensors header that would take far more memory than a checkpoint's do; what is in it is not judged."""
    text = header_text(path, remedy)
    n = text.count(b",") + text.count(b"[") + text.count(b"{")
    if n > MAX_VALUES * 2:
        raise _refusal(path, f"holds {n:,} values in its header, at most {MAX_VALUES * 2:,} are read", remedy)


def read_header(path: Path, remedy: str) -> Header:
    """The header of one of our own files, judged by `parse_header`."""
    text = header_text(path, remedy)
    return Header(parse_header(text, regular_size(path) - 8 - len(text), path, remedy), 8 + len(text))


def parse_header(text: bytes, data_bytes: int, where: object, remedy: str) -> dict[str, Extent]:
    """Tensors by name. They must fill `data_bytes` without gap or overlap, each as large as its dtype and shape say."""
    data = bounded_json(text, where, remedy, max_values=MAX_TENSORS * 12)
    if not isinstance(data, dict):
        raise _refusal(where, "has a header that is no object", remedy)
    about = data.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise _refusal(where, "has metadata other than texts by name", remedy)
    if len(data) > MAX_TENSORS:
        raise _refusal(where, f"names {len(data):,} tensors, at most {MAX_TENSORS:,} are read", remedy)
    tensors = {name: _extent(name, item, where, remedy) for name, item in data.items()}
    end = 0
    for name, extent in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if extent.start != end:
            raise _refusal(
                where, f"has tensor {shown(name)} at byte {extent.start}, the one before ends at {end}", remedy
            )
        end = extent.stop
    if end != data_bytes:
        raise _refusal(where, f"describes {end:,} bytes of tensors, it holds {data_bytes:,}", remedy)
    return tensors


def _extent(name: str, item: object, where: object, remedy: str) -> Extent:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise _refusal(where, f"describes tensor {shown(name)} by other than dtype, shape and data_offsets", remedy)
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refusal(where, f"gives tensor {shown(name)} the unknown dtype {shown(dtype)}", remedy)
    if not is_counts(shape) or len(shape) > _MAX_SIDES or not is_counts(offsets) or len(offsets) != 2:
        raise _refusal(where, f"gives tensor {shown(name)} a shape or offsets that are none", remedy)
    bits = DTYPE_BITS[dtype]
    for side in shape:
        bits *= side
    if bits != 8 * (offsets[1] - offsets[0]):
        what = f"gives tensor {shown(name)} {offsets[1] - offsets[0]:,} bytes, its shape needs {bits / 8:,.1f}"
        raise _refusal(where, what, remedy)
    return Extent(dtype, tuple(shape), offsets[0], offsets[1])


def is_counts(value: object) -> bool:
    """Whether `value` is a list of whole numbers from 0 up to a terabyte; True and 1.0 are none."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_SIDE for n in value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _refusal(where: object, what: str, remedy: str) -> Refusal:
    return Refusal("E_CORRUPT", f"{where} {what}", remedy, 5)
