"""Trace directories on disk: writing one flush by flush, and reading it sequence by sequence. Knows files and columns;
knows nothing of engines, prompts' texts or what is done with a trace.

Each flush is one complete file, written under another name first: whatever kills the process, all flushes but the running
one can be read. Reading holds the sequences of one part and those that go on in the next; nothing grows with the trace.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from duoserve.core import Phase, Refusal, Route, Step
from duoserve.durable import replacing
from duoserve.headers import MAX_JSON, bounded_json, read_json, regular_size
from duoserve.routers import ROUTERS, Router, load_routers, routers_as_file
from traces.schema import (
    ABOUT,
    KEY_COLUMNS,
    KEY_FINGERPRINT,
    KEY_VERSION,
    PHASES,
    PROMPTS,
    REMEDY,
    STATES,
    VERSION,
    About,
    PromptInfo,
    part_schema,
    prompt_of,
)

MAX_PART = 4 << 30  # bytes of a part once it is read
MAX_PROMPTS = 256 << 20  # bytes
__all__ = ["About", "Columns", "PromptInfo", "Recorded", "Traces", "Writer"]


class Columns(NamedTuple):
    """The rows of one flush, as arrays: N tokens, each with all layers.

    `sequence_N`, `step_N`, `position_N`, `token_N`, `decode_N` (bool) are by token, in order of sequence, step, position.
    `ids`, `weights`: per layer (N, K of the layer); `hidden`, `inputs`: per layer (N, D) float16, or None.
    """

    sequence_N: np.ndarray
    step_N: np.ndarray
    position_N: np.ndarray
    token_N: np.ndarray
    decode_N: np.ndarray
    ids: list[np.ndarray]
    weights: list[np.ndarray]
    hidden: list[np.ndarray] | None = None
    inputs: list[np.ndarray] | None = None


class Recorded(NamedTuple):
    """One sequence, whole: a Step of batch 1 with its S rows in order of position, and which of them were decoded."""

    prompt: PromptInfo
    step: Step
    decode_S: torch.Tensor


class Writer:
    """Makes a trace directory; every `write` is durable when it returns."""

    def __init__(self, folder: Path, about: About, routers: list[Router | None]):
        refuse_full(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.about = folder, about
        self.parts = 0
        _replace(folder / ROUTERS, save(*routers_as_file(routers)))
        self.prompts([])
        self.describe(about)

    def describe(self, about: About) -> None:
        """Say of the trace what is known now."""
        self.about = about
        _replace(self.folder / ABOUT, json.dumps(about.to_json(), indent=1).encode())

    def prompts(self, prompts: list[PromptInfo], kept: dict[int, int] | None = None) -> None:
        """All prompts so far, before the first part with rows of theirs. `kept`: tokens that count, where some do not."""
        kept = kept or {}
        lines = (p._asdict() | ({"kept": kept[p.index]} if p.index in kept else {}) for p in prompts)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        _replace(self.folder / PROMPTS, text.encode(errors="replace"))

    def write(self, columns: Columns) -> int:
        """One part; returns its rows."""
        table = _table(columns, self.about.fingerprint)
        plain = [name for name in STATES if name in table.column_names]
        with replacing(self.folder / f"part-{self.parts:05d}.parquet") as stream:
            pq.write_table(
                table,
                stream,
                row_group_size=max(1, table.num_rows),
                compression={n: "NONE" if n in plain else "ZSTD" for n in _leaves(table)},
                use_dictionary=["sequence", "step", "position", "token", "phase", "layer", "ids.list.element"],
                write_statistics=["sequence"],
                write_page_checksum=True,
            )
        self.parts += 1
        return int(table.num_rows)


def refuse_full(folder: Path) -> None:
    """A trace is never mixed with what is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        n = len(list(folder.iterdir())) if folder.is_dir() else 1
        raise Refusal("E_EXISTS", f"{folder} is not empty ({n} files)", "give an empty or new folder")


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as stream:
        stream.write(data)


def _leaves(table: pa.Table) -> list[str]:
    return [f"{f.name}.list.element" if not pa.types.is_dictionary(f.type) and f.type.num_fields else f.name
            for f in table.schema]  # fmt: skip


def _table(columns: Columns, fingerprint: str) -> pa.Table:
    """Arrow's view of the rows, by sequence, layer, step and position."""
    n, layers = len(columns.sequence_N), len(columns.ids)
    order = np.argsort(np.tile(columns.sequence_N, layers), kind="stable")

    def tiled(values_N: np.ndarray, kind: Any) -> pa.Array:
        return pa.array(np.tile(values_N.astype(kind), layers)[order])

    layer = np.repeat(np.arange(layers, dtype=np.int16), n)[order]
    phase = pa.DictionaryArray.from_arrays(tiled(columns.decode_N, np.int8), pa.array(PHASES))
    arrays = [tiled(v, np.int32) for v in columns[:4]] + [phase, pa.array(layer)]
    arrays += [_ragged(columns.ids, order, np.uint16), _ragged(columns.weights, order, np.float32)]
    states: list[str] = []
    for name, values in zip(STATES, (columns.hidden, columns.inputs), strict=True):
        if values is not None:
            states.append(name)
            arrays.append(_fixed(values, order))
    width = (columns.hidden or columns.inputs or [np.empty((0, 0))])[0].shape[1]
    schema = part_schema(fingerprint, width, tuple(states))
    return pa.Table.from_arrays([a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)


def _ragged(values: list[np.ndarray], order: np.ndarray, kind: Any) -> pa.Array:
    """Per layer (N, K), K differing by layer, as lists in `order`."""
    widths = np.repeat([v.shape[1] for v in values], [len(v) for v in values])[order]
    flat = np.zeros((len(order), max((v.shape[1] for v in values), default=0)), kind)
    at = 0
    for v in values:
        flat[at : at + len(v), : v.shape[1]] = v
        at += len(v)
    offsets = np.zeros(len(order) + 1, np.int32)
    np.cumsum(widths, out=offsets[1:])
    inside = np.arange(flat.shape[1]) < widths[:, None]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat[order][inside]))


def _fixed(values: list[np.ndarray], order: np.ndarray) -> pa.Array:
    """Per layer (N, D) float16, as lists in `order`."""
    stacked = np.concatenate(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(stacked[order].reshape(-1)), stacked.shape[1])


class _Piece(NamedTuple):
    """Rows of one sequence in one part, by layer: (S', ...) each."""

    sequence: int
    step_S: np.ndarray
    position_S: np.ndarray
    token_S: np.ndarray
    decode_S: np.ndarray
    ids: list[np.ndarray]
    weights: list[np.ndarray]
    hidden: list[np.ndarray] | None
    inputs: list[np.ndarray] | None


class Traces:
    """A trace directory. Whatever is not as it was written is refused in one line that names the file."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not (self.folder / ABOUT).exists():
            raise Refusal("E_TRACE", f"{self.folder} holds no {ABOUT}", "give a folder that `duoserve trace` made", 3)
        path = self.folder / ABOUT
        self.about = About.of(read_json(path, REMEDY), path)
        found = self._read_prompts()
        self.prompts: list[PromptInfo] = [prompt for prompt, _ in found]
        self._kept = {prompt.index: kept for prompt, kept in found if kept is not None}
        self.parts = sorted(self.folder.glob("part-*.parquet"))
        for number, part in enumerate(self.parts):
            if part.name != f"part-{number:05d}.parquet":
                what = f"{self.folder / f'part-{number:05d}.parquet'} is missing, {part.name} is there"
                raise Refusal("E_TRACE", what, REMEDY, 5)

    def routers(self) -> list[Router | None]:
        """The routers of the model that was traced, by layer."""
        path = self.folder / ROUTERS
        try:
            routers = load_routers(path)
        except Exception as error:  # whatever the bytes made safetensors or us say
            raise _damaged(path, error) from error
        if len(routers) != len(self.about.experts):
            what = f"{path} has {len(routers)} routers, the trace {len(self.about.experts)} layers"
            raise Refusal("E_TRACE", what, REMEDY, 5)
        return routers

    def sequences(self, indices: Collection[int] | None = None, hidden: bool = True) -> Iterator[Recorded]:
        """Each recorded sequence, or those in `indices`; without `hidden` the hidden states stay on disk."""
        wanted = None if indices is None else {int(i) for i in indices}
        spans = [self._span(part, self._open(part)) for part in self.parts]
        pending: dict[int, list[_Piece]] = {}
        for number, (part, span) in enumerate(zip(self.parts, spans, strict=True)):
            if wanted is None or any(span[0] <= s <= span[1] for s in wanted):
                for piece in self._pieces(part, span, wanted, hidden):
                    pending.setdefault(piece.sequence, []).append(piece)
            rest = spans[number + 1 :]
            for sequence in sorted(pending):
                if not any(low <= sequence <= high for low, high in rest):
                    yield self._merged(sequence, pending.pop(sequence), part)

    def _read_prompts(self) -> list[tuple[PromptInfo, int | None]]:
        path = self.folder / PROMPTS
        size = regular_size(path)
        if not 0 <= size <= MAX_PROMPTS:
            what = f"{path} has {max(size, 0):,} bytes or is missing, at most {MAX_PROMPTS:,} are read"
            raise Refusal("E_TRACE", what, REMEDY, 5)
        found = []
        with open(path, "rb") as lines:
            for index, line in enumerate(lines):
                found.append(prompt_of(bounded_json(line[:MAX_JSON], path, REMEDY, 64), index, path))
        return found

    def _open(self, part: Path) -> pq.ParquetMetaData:
        """The part's own description, checked."""
        try:
            about = pq.read_metadata(part)
            said = about.metadata or {}
            version, fingerprint = said.get(KEY_VERSION), said.get(KEY_FINGERPRINT)
            sound = about.num_row_groups == 1 and about.row_group(0).total_byte_size <= MAX_PART
        except Exception as error:  # whatever the bytes made Arrow say
            raise _damaged(part, error) from error
        if version != str(VERSION).encode():
            what = f"{part} is of version {(version or b'none').decode(errors='replace')}, this program reads {VERSION}"
            raise Refusal("E_TRACE", what, REMEDY, 5)
        if fingerprint != self.about.fingerprint.encode():
            theirs = (fingerprint or b"none").decode(errors="replace")[:12]
            what = f"{part} is of model {theirs}, the trace of {self.about.fingerprint[:12]}"
            raise Refusal("E_TRACE", what, "move it out of the folder", 5)
        if not sound:
            raise Refusal("E_TRACE", f"{part} has other than one row group of at most {MAX_PART:,} bytes", REMEDY, 5)
        return about

    def _span(self, part: Path, about: pq.ParquetMetaData) -> tuple[int, int]:
        """The smallest and largest sequence in a part."""
        try:
            statistics = about.row_group(0).column(0).statistics
            low, high = int(statistics.min), int(statistics.max)
        except Exception as error:
            raise _damaged(part, error) from error
        if not 0 <= low <= high < len(self.prompts):
            what = f"{part} has sequences {low} to {high}, {PROMPTS} has {len(self.prompts)} prompts"
            raise Refusal("E_TRACE", what, REMEDY, 5)
        return low, high

    def _pieces(self, part: Path, span: tuple[int, int], wanted: set[int] | None, hidden: bool) -> Iterator[_Piece]:
        try:
            with pq.ParquetFile(part, page_checksum_verification=True) as file:
                names = file.schema_arrow.names
                if names != (file.metadata.metadata or {})[KEY_COLUMNS].decode().split():
                    raise ValueError("columns other than written")
                names = [n for n in names if hidden or n not in STATES]
                table = file.read(columns=names)
                width = {n: file.schema_arrow.field(n).type.list_size for n in STATES if n in names}
            rows = _Rows(table, width)
            rows.check(self.about, span)
        except Exception as error:
            raise _damaged(part, error) from error
        for sequence, start, stop in rows.spans():
            if wanted is None or sequence in wanted:
                yield rows.piece(sequence, start, stop, len(self.about.experts), part)

    def _merged(self, sequence: int, pieces: list[_Piece], part: Path) -> Recorded:
        """One Step of all pieces, without what later steps cancelled."""
        step_S, position_S, token_S, decode_S = (np.concatenate(a) for a in zip(*(p[1:5] for p in pieces), strict=True))
        kept = _kept(step_S, position_S, self._kept.get(sequence))
        if np.any(np.diff(position_S[kept]) <= 0):
            raise Refusal("E_TRACE", f"{part} has sequence {sequence} with positions out of order", REMEDY, 5)
        dtype = getattr(torch, self.about.dtype)

        def joined(by_piece: list[list[np.ndarray] | None], layer: int, kind: torch.dtype) -> torch.Tensor | None:
            if any(p is None for p in by_piece):
                return None
            values = np.concatenate([p[layer] for p in by_piece if p is not None])
            return torch.from_numpy(values if kept.all() else values[kept]).to(kind)

        n = int(kept.sum())
        step = Step(sequence, Phase.PREFILL, n)
        step.ids_BS = torch.from_numpy(token_S[kept].astype(np.int64))[None]
        step.positions_BS = torch.from_numpy(position_S[kept].astype(np.int64))[None]
        for layer in range(len(self.about.experts)):
            ids_TK = torch.from_numpy(np.concatenate([p.ids[layer] for p in pieces])[kept].astype(np.int64))
            weights_TK = joined([p.weights for p in pieces], layer, torch.float32)
            assert weights_TK is not None, (sequence, layer)
            step.routes.append(Route(layer, ids_TK, weights_TK, joined([p.hidden for p in pieces], layer, dtype)))
            entered = joined([p.inputs for p in pieces], layer, dtype)
            if entered is not None:
                step.inputs[layer] = entered
        return Recorded(self.prompts[sequence], step, torch.from_numpy(decode_S[kept]))


def _kept(step_S: np.ndarray, position_S: np.ndarray, length: int | None) -> np.ndarray:
    """Rows that no later step cancelled, by beginning at their position or before it."""
    if not len(step_S):
        return np.zeros(0, bool)
    begins = np.flatnonzero(np.r_[True, step_S[1:] != step_S[:-1]])
    first = np.minimum.reduceat(position_S, begins).astype(np.int64)
    later = np.r_[np.minimum.accumulate(first[::-1])[::-1][1:], np.iinfo(np.int64).max]
    kept = position_S < np.repeat(later, np.diff(np.r_[begins, len(step_S)]))
    return kept if length is None else kept & (position_S < length)


class _Rows:
    """A part's columns as arrays."""

    def __init__(self, table: pa.Table, width: dict[str, int]):
        self._of = {n: table.column(n).to_numpy() for n in ("sequence", "step", "position", "token", "layer")}
        phase = table.column("phase").combine_chunks()
        phase = phase if pa.types.is_dictionary(phase.type) else phase.dictionary_encode()
        decode = np.array([word == "decode" for word in phase.dictionary.to_pylist()])
        self._decode = decode[phase.indices.to_numpy()]
        lists = {name: _one(table.column(name)) for name in ("ids", "weights")}
        self._offsets = lists["ids"].offsets.to_numpy().astype(np.int64)
        if not np.array_equal(self._offsets, lists["weights"].offsets.to_numpy()):
            raise ValueError("ids and weights differ in length")
        self._ids, self._weights = (lists[n].values.to_numpy() for n in ("ids", "weights"))
        self._states = {n: _one(table.column(n)).flatten().to_numpy().reshape(-1, width[n]) for n in width}

    def check(self, about: About, span: tuple[int, int]) -> None:
        """Whether everything is within what the trace says of itself; ValueError says what is not."""
        layer, sequence = self._of["layer"].astype(np.int64), self._of["sequence"].astype(np.int64)
        if not len(layer) or layer.min() < 0 or layer.max() >= len(about.experts) or self._of["position"].min() < 0:
            raise ValueError("a layer or position out of range")
        if np.any(np.diff(sequence * len(about.experts) + layer) < 0):
            raise ValueError("rows out of order")
        if (sequence[0], sequence[-1]) != span:
            raise ValueError("other sequences than it says")
        k = np.diff(self._offsets)
        if np.any(k != np.array(about.choices)[layer]):
            raise ValueError("other than the stated number of choices")
        if np.any(self._ids > np.repeat(np.array(about.experts)[layer], k)):
            raise ValueError("an expert out of range")

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(sequence, first row, row behind the last)."""
        sequence = self._of["sequence"]
        begins = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
        for start, stop in zip(begins, np.r_[begins[1:], len(sequence)], strict=True):
            yield int(sequence[start]), int(start), int(stop)

    def piece(self, sequence: int, start: int, stop: int, layers: int, part: Path) -> _Piece:
        layer = self._of["layer"][start:stop]
        begins = start + np.flatnonzero(np.r_[True, layer[1:] != layer[:-1]])
        ends = np.r_[begins[1:], stop]
        n = int(ends[0] - begins[0])
        if np.any(ends - begins != n) or not np.array_equal(layer[begins - start], np.arange(layers)):
            raise Refusal("E_TRACE", f"{part} has sequence {sequence} with rows of some layers only", REMEDY, 5)

        def lists(values: np.ndarray) -> list[np.ndarray]:
            at = self._offsets
            return [values[at[b] : at[e]].reshape(n, -1) for b, e in zip(begins, ends, strict=True)]

        def states(name: str) -> list[np.ndarray] | None:
            values = self._states.get(name)
            return None if values is None else [values[b:e] for b, e in zip(begins, ends, strict=True)]

        rows = slice(start, start + n)
        step_S, position_S, token_S = (self._of[name][rows] for name in ("step", "position", "token"))
        chosen = (lists(self._ids), lists(self._weights), states("hidden"), states("input"))
        return _Piece(sequence, step_S, position_S, token_S, self._decode[rows], *chosen)


def _one(column: pa.ChunkedArray) -> Any:
    """A column of one row group in one piece; offsets of the piece begin at 0."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _damaged(path: Path, error: Exception) -> Refusal:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return Refusal("E_TRACE", f"{path} is not as it was written ({reason})", "record it again, or restore the file", 5)
