"""The words every floor shares: key, phase, lane, route, step, refusal. Knows no bytes and no models; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Key(NamedTuple):
    """One routed expert: `layer` counts MoE layers only, from 0; `expert` is the router's id."""

    layer: int
    expert: int


class Phase(Enum):
    """How a pass is scheduled: many tokens touch nearly every expert, one token touches a few."""

    PREFILL = "prefill"
    DECODE = "decode"


class Policy(Enum):
    """How experts are brought. The baselines are what DuoServe is compared with, on the same slots."""

    DUOSERVE = "duoserve"  # asynchronous, resident first, kept by worth, guessed ahead where a predictor pays
    LRU = "lru"  # strong on-demand: asynchronous, resident first, the least recently used goes; nothing is guessed
    ON_DEMAND = "on-demand"  # one after the other: an absent expert is fetched and waited for before it is computed
    LFP = "lfp"  # layer-wise full prefetch (MoESys): while a layer computes, all experts of the next one are fetched
    MIF = (
        "mif"  # MoE-Infinity: fetched ahead and kept by the activation ratios of the stored request most like this one
    )
    PAPER = "duoserve-paper"  # DuoServe as published: two buffers in prefill, the predictor's top-k in decode, always
    BELADY = "belady"  # knows the future: what is needed last goes first, what is needed next comes first


class Lane(IntEnum):
    """Transfers known to be needed overtake guesses."""

    DEMAND = 0
    AHEAD = 1


class Route(NamedTuple):
    """What the router of one MoE layer decided for the T rows of a pass.

    Ids and weights are on the host. `hidden_TD` is what the router read, left on the device; only where a predictor or
    an observer asked for it.
    """

    layer: int
    ids_TK: torch.Tensor  # int64; an id equal to the number of experts means "no expert"
    weights_TK: torch.Tensor
    hidden_TD: torch.Tensor | None = None


@dataclass
class Step:
    """One forward pass: its phase, its tokens and, as they become known, one Route per MoE layer.

    Rows are flattened: row = sequence * S + position in the pass, for `batch` sequences of S rows each; the seam sees
    them so. `ids_BS`, `positions_BS` and `padding_BS` are host tensors of shape (batch, S), or None where nobody asked
    for them or the caller gave embeddings instead of ids. `padding_BS` is True where a row is padding and must not be
    learned from. `inputs` holds what entered the decoder layer of a MoE layer, before its attention: (T, D), on the
    device, only where asked for. `previous` is the pass before, where this one goes on with the same sequences.
    """

    index: int
    phase: Phase
    rows: int
    batch: int = 1
    ids_BS: torch.Tensor | None = None
    positions_BS: torch.Tensor | None = None
    padding_BS: torch.Tensor | None = None
    routes: list[Route] = field(default_factory=list)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    previous: Step | None = None

    def route(self, layer: int) -> Route | None:
        """The layer's route, once its router has spoken."""
        return next((route for route in self.routes if route.layer == layer), None)


class Observer(Protocol):
    """Receives each finished Step; runs on the thread that ran the pass, so it must be quick.

    An attribute `wants` names what it needs beyond ids and weights: "hidden" (the routers' inputs), "inputs" (of the
    decoder layers).
    """

    def __call__(self, step: Step) -> Any: ...


class When(Enum):
    """The latest thing that a guess about a layer looks at."""

    START = "start"  # what was known before the pass: earlier tokens, statistics
    INPUT = "input"  # what enters the layer's own attention: leads by one attention block
    ROUTE = "route"  # the route of the layer `lead` before


class Predictor(Protocol):
    """Guesses which experts a layer's router will choose, from the part of a Step that is known before it speaks.

    `rank` gives scores (E,), float32 on the host, larger is likelier, 0 or less where it does not expect an expert at all;
    where it is calibrated, the expected number of the step's rows that choose the expert. `rank_rows` gives the same for
    each row, (T, E). Both look at the step only as `when(layer)` says and raise nothing. In a pass of several rows per
    sequence (a recorded prompt) each row is guessed as if it were decoded alone: it may look at earlier rows' routes of any
    layer, at its own only up to layer - lead.
    `observe` receives each finished Step in order, for predictors that keep account of a sequence.
    """

    name: str
    lead: int
    wants: frozenset[str]  # "hidden", "inputs", as Observer
    fingerprint: str | None  # of the model it was trained for; None where it fits any
    n_bytes: int  # of memory that it holds on the device
    n_params: int

    def when(self, layer: int) -> When | None:
        """None where it has nothing to say about a layer."""
        ...

    def rank(self, step: Step, layer: int) -> torch.Tensor: ...

    def rank_rows(self, step: Step, layer: int) -> torch.Tensor: ...

    def observe(self, step: Step) -> None: ...


class Kernels(Protocol):
    """What was measured of this machine: whether a layer's experts are quicker as one grouped product or one by one."""

    @property
    def machine(self) -> str:
        """Where that was."""
        ...

    def grouped(self, products: Sequence[tuple[int, int]], experts: int, dtype: str, tokens: int) -> bool:
        """Of `experts` with `tokens` rows each, over all their `products` (K, N). ValueError of one line where one of these
        was not measured."""
        ...


LONGEST = 600  # characters of what happened: a stranger's name for a thing can have megabytes


class Refusal(ValueError):
    """The user asked for what cannot be: one line with a code, what happened, the numbers, and what to do next.

    `status` is the exit code of the command line: 2 usage, 3 not found, 4 does not fit, 5 corrupt, 6 disk full, 7 device.
    """

    def __init__(self, code: str, what: str, remedy: str, status: int = 2):
        super().__init__(one_line(f"{code}: {_short(what)}; {remedy}"))
        self.code, self.status = code, status
        self._what, self._remedy = what, remedy

    def under(self, code: str) -> Refusal:
        """The same with another code."""
        return Refusal(code, self._what, self._remedy, self.status)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} ... {text[-200:]}"


def one_line(text: str) -> str:
    """What a stranger named may hold line breaks, terminal controls and halves of characters; none reach a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


FEW = 8


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint naming the closest known word, and all of them where they are few; for messages about unknown names."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    hints = [f"did you mean {close[0]!r}?"] if close else []
    if not close or len(known) <= FEW:
        hints.append(f"known: {', '.join(known)}")
    return " ".join(hints)
