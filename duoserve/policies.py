"""What each policy is made of: what its pool keeps, how its guesses behave, and who schedules. Knows the parts by name; does
nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, Protocol

from duoserve.activation import Activation
from duoserve.ahead import Ahead
from duoserve.cache import ExpertCache, Keep, Slot
from duoserve.core import Policy
from duoserve.crowd import Crowd
from duoserve.decode import Decode
from duoserve.foresight import Foresight
from duoserve.paper import Buffers, TopK
from duoserve.prefill import Prefill
from duoserve.sighted import Sighted
from duoserve.transfer import POLITE, Manners, Transfer
from duoserve.wholelayer import WholeLayer

Think = Callable[[Callable[[], None], int, int, bool], object]


class Schedule(Protocol):
    """Brings the experts of one layer past the compute."""

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]: ...


class Schedules(NamedTuple):
    """Of one policy: prompts, passes that touch a few experts, what comes before it is needed, and passes of many sequences
    that touch most experts (None: as prompts)."""

    dense: Schedule
    sparse: Schedule
    ahead: Foresight
    crowd: Schedule | None = None


KEEP = {Policy.DUOSERVE: Keep.WORTH, Policy.MIF: Keep.TOLD, Policy.BELADY: Keep.TOLD}
MANNERS = {
    Policy.LFP: Manners(waits=True, stays=True),
    Policy.PAPER: Manners(waits=True, stays=True),
    Policy.MIF: Manners(waits=True, trades=True),
    Policy.BELADY: Manners(waits=True),
}


def keep(policy: Policy) -> Keep:
    """What decides which expert goes first."""
    return KEEP.get(policy, Keep.RECENT)


def manners(policy: Policy) -> Manners:
    """How its guesses behave."""
    return MANNERS.get(policy, POLITE)


def schedules(
    policy: Policy, cache: ExpertCache, transfer: Transfer, experts_per_layer: list[int], think: Think
) -> Schedules:
    """Who schedules. `think` runs a predictor beside the compute."""
    if policy is Policy.LFP:
        whole = WholeLayer(cache, transfer, experts_per_layer)
        return Schedules(whole, whole, whole)
    if policy is Policy.PAPER:
        topk = TopK(cache, transfer, experts_per_layer, think)
        return Schedules(Buffers(transfer, topk), Decode(transfer, policy, topk), topk)
    if policy is Policy.MIF:
        alike = Decode(transfer, policy, seen := Activation(cache, transfer, experts_per_layer, think))
        return Schedules(alike, alike, seen)
    if policy is Policy.BELADY:
        alike = Decode(transfer, policy, future := Sighted(cache, transfer, experts_per_layer))
        return Schedules(alike, alike, future)
    ahead = Ahead(cache, transfer, experts_per_layer, think)
    prefill, decode = Prefill(cache, transfer, experts_per_layer, policy), Decode(transfer, policy, ahead)
    return Schedules(prefill, decode, ahead, Crowd(transfer) if policy is Policy.DUOSERVE else None)
