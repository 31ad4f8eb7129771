"""The words every floor shares: key, phase, lane, route, step, refusal. Knows no bytes and no models; imports no torch."""

from __future__ import annotations

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


class Lane(IntEnum):
    """Transfers known to be needed overtake guesses."""

    DEMAND = 0
    AHEAD = 1


class Route(NamedTuple):
    """What the router of one MoE layer decided for the T rows of a pass; everything on the host."""

    layer: int
    ids_TK: torch.Tensor  # int64; an id equal to the number of experts means "no expert"
    weights_TK: torch.Tensor


@dataclass
class Step:
    """One forward pass: its phase, its tokens and, once finished, one Route per MoE layer.

    `ids_BS`, `positions_BS` and `padding_BS` are host tensors of shape (batch, sequence), or None where the caller
    gave embeddings instead of ids. The seam sees rows flattened in that order: row = batch * S + position in the pass.
    `padding_BS` is True where a row is padding and must not be learned from.
    """

    index: int
    phase: Phase
    rows: int
    ids_BS: torch.Tensor | None = None
    positions_BS: torch.Tensor | None = None
    padding_BS: torch.Tensor | None = None
    routes: list[Route] = field(default_factory=list)


class Observer(Protocol):
    """Receives each finished Step; runs on the thread that ran the pass, so it must be quick."""

    def __call__(self, step: Step) -> Any: ...


LONGEST = 600  # characters of what happened: a stranger's name for a thing can have megabytes


class Refusal(ValueError):
    """The user asked for what cannot be: one line with a code, what happened, the numbers, and what to do next.

    `status` is the exit code of the command line: 2 usage, 3 not found, 4 does not fit, 5 corrupt, 6 disk full, 7 device.
    """

    def __init__(self, code: str, what: str, remedy: str, status: int = 2):
        super().__init__(_one_line(f"{code}: {_short(what)}; {remedy}"))
        self.code, self.status = code, status
        self._what, self._remedy = what, remedy

    def under(self, code: str) -> Refusal:
        """The same with another code."""
        return Refusal(code, self._what, self._remedy, self.status)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} ... {text[-200:]}"


def _one_line(text: str) -> str:
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
