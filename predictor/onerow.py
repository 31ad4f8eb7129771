"""One row of a head, as decode asks for it: the same function as `Head.scores` of the same features, compiled where that can
be, else in a few numpy calls. Knows the features' layout; knows no training.

Why not torch: every torch call gives the interpreter's lock away, and so does a product in numpy; the copies' threads take
it, and a ranking of 30 microseconds then takes ten times as long. The compiled one keeps the lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from duoserve import native
from duoserve.core import Step
from predictor.features import Feature


class OneRow:
    """A head's weights as float32 arrays, and room for its features. Not for several threads at once."""

    def __init__(
        self,
        wanted: Sequence[Feature],
        experts: Sequence[int],
        dim: int,
        in_weight: torch.Tensor,
        in_bias: torch.Tensor,
        out_weight: torch.Tensor,
    ):
        self._w_ZN, self._b_Z, self._v_EU = (t.float().contiguous().numpy() for t in (in_weight, in_bias, out_weight))
        widths = [f.width(experts, dim) for f in wanted]
        ends = np.cumsum(widths)
        self._f_N = np.zeros(int(ends[-1]), dtype=np.float32)
        self._z_Z, self._s_E = np.empty_like(self._b_Z), np.empty(self._v_EU.shape[0], dtype=np.float32)
        self._compiled, self._call = native.head(), self._arguments()
        self._parts = [
            (f, self._f_N[end - width : end]) for f, end, width in zip(wanted, ends.tolist(), widths, strict=True)
        ]

    def rank(self, step: Step) -> torch.Tensor:
        """Scores (E,) of a step of one row."""
        for feature, into in self._parts:
            _fill(step, feature, into)
        if self._compiled is not None:
            self._compiled(*self._call)
            return torch.from_numpy(self._s_E.copy())
        z_Z = self._w_ZN @ self._f_N
        z_Z += self._b_Z
        e = self._v_EU.shape[0]
        u_U = z_Z[e:]
        s_E = z_Z[:e] + self._v_EU @ (u_U * _sigmoid(u_U))
        return torch.from_numpy(_sigmoid(s_E))

    def _arguments(self) -> tuple[int, ...]:
        arrays = (self._w_ZN, self._b_Z, self._v_EU, self._f_N, self._z_Z, self._s_E)
        return (*(a.ctypes.data for a in arrays), self._w_ZN.shape[1], *self._v_EU.shape)


def _last_row(x_TD: torch.Tensor) -> np.ndarray:
    """(D,) float32, without a torch operation where that can be: bfloat16 is the upper half of float32."""
    if x_TD.dtype is torch.float32:
        return x_TD.numpy()[-1]
    if x_TD.dtype is not torch.bfloat16 or not x_TD.is_contiguous():
        return x_TD[-1].float().numpy()
    t, d = x_TD.shape
    halves = (ctypes.c_uint16 * d).from_address(x_TD.data_ptr() + 2 * d * (t - 1))
    return (np.frombuffer(memoryview(halves), dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))


def _fill(step: Step, feature: Feature, into: np.ndarray) -> None:
    kind, layer = feature
    source: Step | None = step
    if kind.startswith("before."):
        kind, source = kind[len("before.") :], step.previous
    into.fill(0)
    if source is None or source.batch != 1:
        return
    if kind == "input":
        _fill_input(source, layer, into)
        return
    route = source.route(layer)
    if route is None:
        return
    if kind == "hidden":
        if route.hidden_TD is not None:
            into[:] = _last_row(route.hidden_TD)
        return
    weights_K = _last_row(route.weights_TK)
    ids_K = route.ids_TK.numpy()[-1]
    known = ids_K < into.shape[0]
    scale = len(weights_K) / max(float(weights_K.sum()), 1e-6)
    into[ids_K[known]] = weights_K[known] * np.float32(scale)


def _fill_input(step: Step, layer: int, into: np.ndarray) -> None:
    x_TD = step.inputs.get(layer)
    if x_TD is not None:
        x_D = _last_row(x_TD)
        into[:] = x_D / np.sqrt(np.dot(x_D, x_D) / len(x_D) + np.float32(1e-6))
