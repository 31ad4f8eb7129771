"""What a trace says of a model's routers, as plain values. Knows recorded Steps; draws and prints nothing.

Everything is measured twice: over all rows, and over decoded rows alone. A prompt's rows count as if they had been decoded
one by one, in order. `Stats` has counts; what follows from them are its properties and methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from traces.store import About, Recorded, Traces

NEVER = np.iinfo(np.int64).max  # distance of what is not chosen again
FARTHEST = 1024  # tokens; reuse beyond it is counted as if there
MOST_SHARE = 0.9  # of a layer's routing
AGAIN = (1, 8)  # tokens within which a choice is repeated


@dataclass
class Stats:
    """Counts over the rows of one kind. L layers of up to E experts; ids that mean "no expert" are left out."""

    experts: list[int]
    tokens: int = 0
    chosen_LE: np.ndarray = field(init=False)  # times
    together_LEE: np.ndarray = field(init=False)  # tokens that chose e in a layer and f in the next
    reuse_LN: np.ndarray = field(init=False)  # [layer, n]: choices made again n tokens later; the last: or more
    repeated_LA: np.ndarray = field(init=False)  # made again within AGAIN tokens
    followed_LA: np.ndarray = field(init=False)  # that had so many tokens behind them
    depths_N: np.ndarray = field(init=False)  # [n]: choices with n others chosen since the last time
    accesses: int = 0  # all choices, first times too

    def __post_init__(self) -> None:
        n, e = len(self.experts), max(self.experts)
        self.chosen_LE = np.zeros((n, e), np.int64)
        self.together_LEE = np.zeros((max(0, n - 1), e, e), np.int64)
        self.reuse_LN = np.zeros((n, FARTHEST + 1), np.int64)
        self.repeated_LA, self.followed_LA = (np.zeros((n, len(AGAIN)), np.int64) for _ in range(2))
        self.depths_N = np.zeros(sum(self.experts), np.int64)

    def add(self, ids: list[np.ndarray]) -> None:
        """One sequence's choices by layer, (S, K) each, in order."""
        if not len(ids[0]):
            return
        self.tokens += len(ids[0])
        before = None
        for layer, ids_SK in enumerate(ids):
            chosen_SE = _one_hot(ids_SK, self.chosen_LE.shape[1], self.experts[layer])
            self.chosen_LE[layer] += chosen_SE.sum(0, dtype=np.int64)
            if before is not None:
                self.together_LEE[layer - 1] += (before.T @ chosen_SE).astype(np.int64)
            before = chosen_SE
            self._add_reuse(layer, ids_SK)

    def _add_reuse(self, layer: int, ids_SK: np.ndarray) -> None:
        distance_SK = next_use(ids_SK)
        real_SK = ids_SK < self.experts[layer]
        again = distance_SK[(distance_SK != NEVER) & real_SK]
        self.reuse_LN[layer] += np.bincount(np.minimum(again, FARTHEST), minlength=FARTHEST + 1)
        for n, within in enumerate(AGAIN):
            followed = np.s_[: max(0, len(ids_SK) - within)]
            self.repeated_LA[layer, n] += int(((distance_SK <= within) & real_SK)[followed].sum())
            self.followed_LA[layer, n] += int(real_SK[followed].sum())

    @property
    def share_LE(self) -> np.ndarray:
        """Of each layer's choices, those of each expert; zeros where a layer made none."""
        return self.chosen_LE / np.maximum(self.chosen_LE.sum(1, keepdims=True), 1)

    @property
    def needed_L(self) -> np.ndarray:
        """Experts, the most popular first, that together make MOST_SHARE of a layer's choices."""
        falling = np.cumsum(-np.sort(-self.share_LE, axis=1), axis=1)
        return 1 + (falling < MOST_SHARE - 1e-12).sum(1)

    @property
    def entropy_L(self) -> np.ndarray:
        """Of each layer's choices, over the entropy of choosing all alike: 1 is uniform."""
        p = self.share_LE
        bits = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
        return bits / np.log(np.maximum(self.experts, 2))

    @property
    def follower_L(self) -> np.ndarray:
        """For each layer but the last: how likely a choice's likeliest follower in the next layer is, on average."""
        chosen = self.chosen_LE[:-1]
        return self.together_LEE.max(2).sum(1) / np.maximum(chosen.sum(1), 1)

    @property
    def popular_L(self) -> np.ndarray:
        """For each layer: the share of tokens that choose its most popular expert."""
        return self.chosen_LE.max(1) / max(self.tokens, 1)

    @property
    def affinity_LEE(self) -> np.ndarray:
        """[layer, e, f]: share of the tokens that chose e in a layer which choose f in the next."""
        return self.together_LEE / np.maximum(self.chosen_LE[:-1, :, None], 1)

    @property
    def repeated_A(self) -> np.ndarray:
        """Share of choices made again within AGAIN tokens; `repeated_by_layer` the same for each layer."""
        return self.repeated_LA.sum(0) / np.maximum(self.followed_LA.sum(0), 1)

    @property
    def repeated_by_layer(self) -> np.ndarray:
        return self.repeated_LA / np.maximum(self.followed_LA, 1)

    @property
    def reuse_median(self) -> float | None:
        """Tokens until a choice is made again, of those that are."""
        counts = np.cumsum(self.reuse_LN.sum(0))
        return float(np.searchsorted(counts, (counts[-1] + 1) // 2)) if counts[-1] else None

    @property
    def lru_N(self) -> np.ndarray:
        """Hit rate of one LRU pool of 1, 2, ... slots for all layers; the first time of an expert is a miss."""
        return np.cumsum(self.depths_N) / max(self.accesses, 1)

    def lru(self, residency: float) -> float:
        """Hit rate of a pool for this share of the experts."""
        slots = int(residency * len(self.depths_N) + 1e-9)
        return float(self.lru_N[slots - 1]) if slots else 0.0


class Measured(NamedTuple):
    """A trace's figures: over all rows, and over decoded ones."""

    about: About
    sequences: int
    every: Stats
    decode: Stats


def measure(traces: Traces) -> Measured:
    """Read a trace once, sequence by sequence."""
    experts = traces.about.experts
    every, decode = Stats(experts), Stats(experts)
    pools = LruDepths(every), LruDepths(decode)
    n = 0
    for recorded in traces.sequences(hidden=False):
        n += 1
        ids, decoded = _ids(recorded), recorded.decode_S.numpy()
        for stats, pool, chosen in ((every, pools[0], ids), (decode, pools[1], [i[decoded] for i in ids])):
            stats.add(chosen)
            pool.add(chosen)
    return Measured(traces.about, n, every, decode)


def _ids(recorded: Recorded) -> list[np.ndarray]:
    return [route.ids_TK.numpy() for route in recorded.step.routes]


def _one_hot(ids_SK: np.ndarray, width: int, experts: int) -> np.ndarray:
    """(S, E) float32; ids from `experts` on are no expert."""
    hot = np.zeros((len(ids_SK), max(width, experts) + 1), np.float32)
    np.put_along_axis(hot, np.minimum(ids_SK, experts), 1, axis=1)
    hot[:, experts] = 0
    return hot[:, :width]


def next_use(ids_SK: np.ndarray) -> np.ndarray:
    """(S, K): rows until the same id is chosen again, NEVER where it is not."""
    flat = ids_SK.reshape(-1)
    row = np.repeat(np.arange(len(ids_SK)), ids_SK.shape[1])
    order = np.argsort(flat, kind="stable")
    found = np.full(len(flat), NEVER)
    same = flat[order[1:]] == flat[order[:-1]]
    found[order[:-1][same]] = (row[order[1:]] - row[order[:-1]])[same]
    return found.reshape(ids_SK.shape)


class LruDepths:
    """Stack distances (Mattson et al. 1970) of choices in the order of decode: token by token, layer by layer.

    A choice with d other experts chosen since its last time hits every LRU pool of more than d slots, so that one pass
    gives the hit rate of all sizes. `last_N`: when each expert of each layer was chosen, -1 for never.
    """

    def __init__(self, stats: Stats):
        self._stats, self._now = stats, 0
        self._first_L = np.r_[0, np.cumsum(stats.experts)[:-1]]
        self._last_N = np.full(sum(stats.experts), -1, np.int64)

    def add(self, ids: list[np.ndarray]) -> None:
        """One sequence's choices by layer; a layer's K experts are touched in the router's order."""
        experts = np.repeat(self._stats.experts, [i.shape[1] for i in ids])
        first = np.repeat(self._first_L, [i.shape[1] for i in ids])
        chosen_SN = np.concatenate(ids, axis=1)
        for row, real in zip(chosen_SN + first, chosen_SN < experts, strict=True):
            self._touch(row if real.all() else row[real])

    def _touch(self, keys: np.ndarray) -> None:
        """Keys of one token, each once."""
        last = self._last_N[keys]
        later = len(self._last_N) - np.searchsorted(np.sort(self._last_N), last, side="right")
        earlier_here = np.tril(last[None, :] < last[:, None], -1).sum(1)  # touched a moment ago, but long before that
        depths = (later + earlier_here)[last >= 0]
        np.add.at(self._stats.depths_N, depths, 1)
        self._stats.accesses += len(keys)
        self._last_N[keys] = np.arange(self._now, self._now + len(keys))
        self._now += len(keys)


def to_json(found: Measured) -> dict[str, Any]:
    """All figures but the large matrices."""
    about = found.about
    head = {"sequences": found.sequences, "fingerprint": about.fingerprint, "experts": about.experts}
    head |= {"choices": about.choices, "residency": about.residency}
    return head | {name: _figures(stats) for name, stats in (("all", found.every), ("decode", found.decode))}


def _figures(s: Stats) -> dict[str, Any]:
    return {
        "tokens": s.tokens,
        "popularity": [list(map(float, row[:e])) for row, e in zip(s.share_LE.round(6), s.experts, strict=True)],
        "experts_for_90_percent": s.needed_L.tolist(),
        "entropy_over_uniform": s.entropy_L.round(6).tolist(),
        "likeliest_follower": s.follower_L.round(6).tolist(),
        "most_popular": s.popular_L.round(6).tolist(),
        "reuse_median_tokens": s.reuse_median,
        "reuse_histogram": np.trim_zeros(s.reuse_LN.sum(0), "b").tolist(),
        **{f"repeated_within_{n}": float(share) for n, share in zip(AGAIN, s.repeated_A, strict=True)},
        "lru_hit_rate": {f"{r}%": s.lru(r / 100) for r in range(5, 101, 5)},
    }


def table(found: Measured) -> list[tuple[str, str, str]]:
    """Rows to print: what, over all rows, over decoded rows."""
    both = (found.every, found.decode)
    most = max(found.about.experts)

    def row(what: str, say: Any) -> tuple[str, str, str]:
        every, decode = (say(s) if s.tokens else "-" for s in both)
        return what, every, decode

    rows = [
        (
            f"{found.sequences} sequences, {len(found.about.experts)} layers of {most} experts",
            "all rows",
            "decoded rows",
        ),
        row("tokens", lambda s: f"{s.tokens:,}"),
        row("experts for 90 % of a layer's routing", lambda s: _range(s.needed_L, "d")),
        row("entropy over uniform, by layer", lambda s: _range(s.entropy_L, ".3f")),
        row("share of tokens with a layer's most popular expert", lambda s: _range(s.popular_L, ".0%")),
        row("likeliest follower in the next layer chosen", lambda s: _range(s.follower_L, ".0%")),
        row("chosen again, tokens until (median)", lambda s: _plain(s.reuse_median)),
    ]
    for n, within in enumerate(AGAIN):
        what = "repeated by the next token" if within == 1 else f"repeated within {within} tokens"
        rows.append(row(what, lambda s, n=n: f"{s.repeated_A[n]:.1%}"))
    for share in (0.125, 0.25, 0.5, 0.75):
        rows.append(row(f"LRU hits with {share:.1%} resident", lambda s, share=share: f"{s.lru(share):.1%}"))
    return rows


def _range(values: Iterable[float], spec: str) -> str:
    some = list(values)
    if not some:
        return "-"
    middle = sorted(some)[len(some) // 2]
    return f"{middle:{spec}} ({min(some):{spec}} to {max(some):{spec}})"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def both(found: Measured) -> Iterator[tuple[str, Stats]]:
    """The two kinds of rows, by name, where there are any."""
    for name, stats in (("all rows", found.every), ("decoded rows", found.decode)):
        if stats.tokens:
            yield name, stats
