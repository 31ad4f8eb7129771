"""JSON files: written whole or not at all, and values out of one that somebody else wrote, each checked before it is used.
Knows JSON and bounds; knows nothing of what a file is about. All that reads raises ValueError of one line.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MAX_TEXT = 200


def read_json(path: Path, most: int) -> Any:
    """Of a plain file of at most `most` bytes: no name twice, no number that is none."""
    return json.loads(_bytes(path, most), parse_constant=_refuse, object_pairs_hook=_once)


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """Replace the file at once: a reader sees the old one or the new one. OSError names the file and the bytes it takes."""
    said = (json.dumps(data, allow_nan=False, indent=indent) + "\n").encode()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(said)
        aside.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} for {len(said):,} bytes", str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _bytes(path: Path, most: int) -> bytes:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("no plain file")
            data = file.read(most + 1)
    except FileNotFoundError as error:
        raise ValueError("there is no such file") from error
    except IsADirectoryError as error:
        raise ValueError("a folder") from error
    if len(data) > most:
        raise ValueError(f"has more than the {most:,} bytes that are read")
    return data


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A name twice is two readers that see two files."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{len(pairs)} names, {len(found)} of them different")
    return found


def only(data: Any, names: set[str]) -> dict[str, Any]:
    """An object of exactly these names."""
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data)[:16] if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"has {shown(found)}, not {sorted(names)}")
    return data


def values(what: str, value: Any, n: int) -> list[Any]:
    """A list of `n`."""
    if not isinstance(value, list) or len(value) != n:
        raise ValueError(f"{what} is {shown(value)}, not {n} values")
    return value


def several(what: str, value: Any, most: int) -> list[Any]:
    """A list of 1 to `most`."""
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise ValueError(f"{what} is {shown(value)}, not 1 to {most:,} values")
    return value


def count(what: str, value: Any, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} {shown(value)} is no whole number from {least} to {most:,}")
    return value


def number(what: str, value: Any, most: float) -> float:
    if type(value) not in (int, float) or not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{what} {shown(value)} is not between 0 and {most:g}")
    return float(value)


def text(what: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"{what} is no short text")
    return value


def shown(value: Any) -> str:
    try:
        said = repr(value)
    except (ValueError, RecursionError):  # whole numbers of many digits, lists in lists
        return type(value).__name__
    return said if len(said) <= 60 else said[:57] + "..."
