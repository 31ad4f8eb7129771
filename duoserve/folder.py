"""Which files of a checkpoint folder are its weights and which go along; knows names, opens no tensors."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from duoserve.core import Refusal
from duoserve.headers import read_json, shown

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_WEIGHTS = 1 << 18  # tensors that an index names; the largest published models have some 100,000
MAX_LAYERS, MAX_EXPERTS = 1024, 1 << 16  # that a config may ask for; published models have some 100, and some 1,000
_LAYERS = re.compile(r"(\w*(?<!_per)_)?(layers?|blocks|depth)")
_EXPERTS = re.compile(r"\w*experts")
SIDE_FILES = re.compile(
    r"(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template.*)"
    r"\.(json|jinja|txt|model)|chat_template\.jinja|tokenizer\.model|.*\.tiktoken"
)


def read_raw(folder: Path) -> dict[str, Any]:
    """config.json as it is; refuses one that would run code."""
    path = folder / CONFIG
    if not path.is_file():
        raise Refusal(
            "E_MODEL", f"{folder} has no config.json", "give a checkpoint folder, an expert store or a hub id", 3
        )
    try:
        raw = read_json(path, "fetch the checkpoint again")
    except Refusal as refusal:
        raise refusal.under("E_CONFIG") from refusal
    if not isinstance(raw, dict):
        raise Refusal(
            "E_CONFIG", f"{path} holds a {type(raw).__name__}, not an object", "fetch the checkpoint again", 5
        )
    if "auto_map" in raw:
        raise Refusal(
            "E_REMOTE_CODE",
            f"{folder} wants to run its own code (auto_map)",
            "use a checkpoint that transformers knows",
        )
    _refuse_counts(raw, path)
    return raw


def _refuse_counts(raw: dict[str, Any], where: Path) -> None:
    """Numbers of layers and experts become loops and lists as soon as a config is read; all other numbers are only sizes."""
    for name, value in _fields(raw):
        most = MAX_LAYERS if _LAYERS.fullmatch(name) else MAX_EXPERTS if _EXPERTS.fullmatch(name) else None
        if most and type(value) is int and value > most:
            what = f"{where} asks for {name} {shown(value)}, at most {most:,} are built"
            raise Refusal("E_CONFIG", what, "fetch the checkpoint again", 5)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values at any depth."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield from part.items()
        todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def side_files(folder: Path) -> list[Path]:
    """Config, generation config, tokenizer and chat template."""
    return [p for p in sorted(folder.iterdir()) if p.is_file() and SIDE_FILES.fullmatch(p.name)]


def weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or the one file; refuses a folder without."""
    if (folder / INDEX).is_file():
        names = shards(folder / INDEX)
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise Refusal(
                "E_CORRUPT",
                f"{len(missing)} of {len(names)} shards are missing, {missing[0]} first",
                "fetch them again",
                5,
            )
        return [folder / n for n in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise no_weights(folder, os.listdir(folder))


def no_weights(where: object, files: Iterable[str]) -> Refusal:
    """Says which other formats there are instead."""
    kinds = Counter(os.path.splitext(file)[1] for file in files)
    others = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()) if kind in (".bin", ".gguf", ".pt", ".pth"))
    what = f"{where} has no {SINGLE} and no {INDEX}" + (f", only {others}" if others else "")
    return Refusal("E_MODEL", what, "use a checkpoint in safetensors; other formats can run code when loaded", 3)


def shards(index: Path) -> list[str]:
    """The files that an index names, each of which must lie beside it."""
    try:
        names = sorted(set(read_json(index, "fetch it again", max_values=MAX_WEIGHTS)["weight_map"].values()))
    except Refusal:
        raise
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Refusal("E_CORRUPT", f"{index} is not a shard index ({error!r})", "fetch it again", 5) from error
    bad = [n for n in names if not isinstance(n, str) or os.path.basename(n) != n or not n.endswith(".safetensors")]
    if bad:
        raise Refusal("E_CORRUPT", f"{index} names {bad[0]!r}, which is no file of this folder", "fetch it again", 5)
    if not names:
        raise Refusal("E_CORRUPT", f"{index} names 0 shards", "fetch it again", 5)
    return names
