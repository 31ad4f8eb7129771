"""An observer that writes what it sees: finished Steps become the rows of a trace. Knows Steps and when to flush; knows
nothing of prompts' texts, engines or files.

While a model decodes, a Step is only appended to a list; what costs is done at the flush, for thousands of Steps at once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duoserve.core import Phase, Route, Step
from duoserve.routers import Router
from traces.schema import VERSION, About, PromptInfo
from traces.store import Columns, Writer

FLUSH_BYTES, FLUSH_S = 64 << 20, 10.0
_F16 = torch.finfo(torch.float16).max
__all__ = ["About", "PromptInfo", "Recorder", "about"]


def about(
    fingerprint: str,
    dtype: torch.dtype,
    experts: list[int],
    choices: list[int],
    hidden: bool = False,
    residency: float | None = None,
    options: dict[str, Any] | None = None,
) -> About:
    """An `About` of this version, the figures still to come."""
    name = str(dtype).removeprefix("torch.")
    return About(VERSION, fingerprint, name, experts, choices, hidden, None, None, residency, options or {})


@dataclass
class _Sequence:
    info: PromptInfo
    n_tokens: int = 0  # of the prompt
    any_rows: bool = False
    decoding: bool = False
    over: bool = False  # it ended while others of its batch go on
    digest: Any = field(default_factory=hashlib.sha256)


class Recorder:
    """Receives each finished Step of one engine; `flush` and `close` write, as does the time that passes.

    A prompt that begins at position 0 starts new sequences, one per row of its batch; what follows goes on with them. Rows
    that are padding are left out, and, where several sequences run, what comes behind one of the ids in `ends`.
    """

    def __init__(
        self,
        folder: Path,
        about: About,
        routers: list[Router | None],
        ends: Collection[int] = (),
        flush_bytes: int = FLUSH_BYTES,
        flush_s: float = FLUSH_S,
    ):
        self.wants = frozenset({"hidden", "inputs"}) if about.hidden else frozenset()
        self._writer = Writer(folder, about, routers)
        self._ends = np.array(sorted(ends), dtype=np.int64)
        self._flush_bytes, self._flush_s = flush_bytes, flush_s
        self._layers = len(about.experts)
        self._pending: list[Step | list[int]] = []
        self._bytes, self._flushed = 0, time.monotonic()
        self._expected: list[tuple[str, str]] = []
        self._sequences: list[_Sequence] = []
        self._running: list[int] = []
        self._kept: dict[int, int] = {}
        self.rows = 0  # that are written

    @property
    def about(self) -> About:
        return self._writer.about

    @property
    def sequences(self) -> int:
        """Sequences that are written, at least in part."""
        return sum(sequence.any_rows for sequence in self._sequences)

    def expect(self, id: str, domain: str) -> None:
        """Say where the next sequence comes from that nobody spoke of yet."""
        self._expected.append((id, domain))

    def ended(self, lengths: Sequence[int]) -> None:
        """Say how many tokens the running sequences have: what the last pass drafted behind them was rejected."""
        self._pending.append(list(lengths))

    def __call__(self, step: Step) -> None:
        self._pending.append(_on_host(step) if self.wants else replace(step, previous=None))
        self._bytes += step.rows * self._row_bytes(step)
        if self._bytes >= self._flush_bytes or time.monotonic() - self._flushed >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Write what was seen so far, durably."""
        pending, self._pending, self._bytes = self._pending, [], 0
        noted = [self._note(item) for item in pending if self._is_whole(item)]
        rows = [n for n in noted if n is not None]
        if pending:
            self._writer.prompts([self._info(s) for s in self._sequences], self._kept)
        if rows and (columns := self._columns(rows)) is not None:
            self.rows += self._writer.write(columns)
        self._flushed = time.monotonic()

    def close(self, layer_s: float | None = None, slab_s: float | None = None) -> None:
        """Flush, and note the figures that are known only now."""
        self.flush()
        self._writer.describe(replace(self.about, layer_s=layer_s, slab_s=slab_s))

    def _row_bytes(self, step: Step) -> int:
        route = step.routes[0] if step.routes else None
        if route is None:
            return 0
        wide = sum(t.shape[-1] * 2 for t in (route.hidden_TD, step.inputs.get(0)) if t is not None)
        return self._layers * (32 + 6 * route.ids_TK.shape[-1] + wide)

    def _is_whole(self, item: Step | list[int]) -> bool:
        """Not a pass that was broken off, whose later layers have no routes."""
        return isinstance(item, list) or len(item.routes) == self._layers

    def _info(self, sequence: _Sequence) -> PromptInfo:
        digest = sequence.digest.hexdigest()[:16]
        return sequence.info._replace(digest=digest, n_tokens=sequence.n_tokens)

    def _note(self, item: Step | list[int]) -> _Rows | None:
        if isinstance(item, list):
            self._kept.update(zip(self._running, item, strict=False))
            return None
        rows = _Rows(item)
        if self._begins(rows):
            self._start(item.batch)
        rows.number = np.repeat(self._running, rows.length)
        if rows.batch > 1 and rows.length == 1 and item.phase is Phase.DECODE:
            self._leave_ended(rows)
        self._account(rows)
        return rows

    def _begins(self, rows: _Rows) -> bool:
        if len(self._running) != rows.batch:
            return True
        if rows.decode:
            return False
        has = np.array([self._sequences[n].any_rows for n in self._running])
        restarts = ((rows.position_BS == 0) & rows.kept_BS).any(axis=1) | bool((rows.position_BS[:, 0] == 0).all())
        return bool((restarts & has).any())

    def _start(self, batch: int) -> None:
        begin = len(self._sequences)
        for index in range(begin, begin + batch):
            id, domain = self._expected.pop(0) if self._expected else (f"generate-{index}", "generate")
            self._sequences.append(_Sequence(PromptInfo(index, id, domain, "", 0)))
        self._running = list(range(begin, begin + batch))

    def _leave_ended(self, rows: _Rows) -> None:
        """transformers pads a sequence that has ended until its batch has; the padding is not marked as such."""
        at_end = np.isin(rows.token_BS[:, 0], self._ends)
        for row, number in enumerate(self._running):
            sequence = self._sequences[number]
            sequence.over |= bool(at_end[row])
            if sequence.over:
                rows.kept_BS[row] = False

    def _account(self, rows: _Rows) -> None:
        for row, number in enumerate(self._running):
            sequence = self._sequences[number]
            sequence.any_rows = sequence.any_rows or bool(rows.kept_BS[row].any())
            sequence.decoding |= rows.decode
            if not sequence.decoding:
                tokens = rows.token_BS[row][rows.kept_BS[row]]
                sequence.n_tokens += len(tokens)
                sequence.digest.update(tokens.astype("<i4").tobytes())

    def _columns(self, rows: list[_Rows]) -> Columns | None:
        kept = np.concatenate([r.kept_BS.reshape(-1) for r in rows])
        number = np.concatenate([r.number for r in rows])[kept]
        if not len(number):
            return None
        order = np.flatnonzero(kept)[np.argsort(number, kind="stable")]  # steps and positions already ascend
        at = torch.from_numpy(order)
        routes = [[_route(r.step, layer) for r in rows] for layer in range(self._layers)]

        def by_token(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([p.reshape(-1) for p in parts])[order]

        steps = by_token([np.full(len(r.number), r.step.index) for r in rows])
        decoded = by_token([np.full(len(r.number), r.decode) for r in rows])
        positions, tokens = (by_token([getattr(r, n) for r in rows]) for n in ("position_BS", "token_BS"))
        ids = [torch.cat([r.ids_TK for r in layer])[at].numpy() for layer in routes]
        weights = [torch.cat([r.weights_TK for r in layer])[at].float().numpy() for layer in routes]
        hidden = [_states([r.hidden_TD for r in layer], at) for layer in routes]
        inputs = [_states([r.step.inputs.get(n) for r in rows], at) for n in range(self._layers)]
        number = np.concatenate([r.number for r in rows])[order]
        return Columns(number, steps, positions, tokens, decoded, ids, weights, _all(hidden), _all(inputs))


class _Rows:
    """One Step's tokens as arrays (batch, S); `number`: the sequence of each row, flat."""

    number: np.ndarray

    def __init__(self, step: Step):
        self.step, self.batch, self.length = step, step.batch, step.rows // step.batch
        self.decode = step.phase is Phase.DECODE
        shape = (self.batch, self.length)
        self.token_BS = step.ids_BS.numpy() if step.ids_BS is not None else np.full(shape, -1)
        self.position_BS = (
            step.positions_BS.numpy()
            if step.positions_BS is not None
            else np.arange(self.length) + np.zeros(shape, int)
        )
        self.kept_BS = ~step.padding_BS.numpy() if step.padding_BS is not None else np.ones(shape, bool)


def _route(step: Step, layer: int) -> Route:
    route = step.routes[layer] if step.routes[layer].layer == layer else step.route(layer)
    assert route is not None, (step.index, layer)
    return route


def _on_host(step: Step) -> Step:
    """What lies on the device is copied now: later its memory may be another tensor's."""
    routes, inputs = step.routes, dict(step.inputs)
    if any(r.hidden_TD is not None and r.hidden_TD.device.type != "cpu" for r in routes[:1]):
        routes = [r if r.hidden_TD is None else r._replace(hidden_TD=r.hidden_TD.to("cpu")) for r in routes]
        inputs = {layer: x_TD.to("cpu") for layer, x_TD in inputs.items()}
    return replace(step, routes=routes, inputs=inputs, previous=None)


def _states(states: list[torch.Tensor | None], at: torch.Tensor) -> np.ndarray | None:
    """(N, D) float16, what is beyond float16 as its largest; None where some are missing."""
    there = [s for s in states if s is not None]
    if len(there) < len(states):
        return None
    flat = torch.cat([s.reshape(-1, s.shape[-1]) for s in there])[at]
    return flat.clamp(-_F16, _F16).half().numpy()


def _all(by_layer: list[np.ndarray | None]) -> list[np.ndarray] | None:
    there = [x for x in by_layer if x is not None]
    return there if len(there) == len(by_layer) else None
