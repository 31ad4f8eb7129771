"""What each policy is made of: what its pool keeps, how its guesses behave, and who schedules. Knows the parts by name; does
nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, Protocol

from duoserve.ahead import Ahead
from duoserve.cache import ExpertCache, Keep, Slot
from duoserve.core import Policy
from duoserve.decode import Decode
from duoserve.device import Event
from duoserve.foresight import Foresight
from duoserve.prefill import Prefill
from duoserve.transfer import POLITE, Manners, Transfer
from duoserve.wholelayer import WholeLayer

Think = Callable[[Callable[[], None], bool], Event]


class Schedule(Protocol):
    """Brings the experts of one layer past the compute."""

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]: ...


class Schedules(NamedTuple):
    """Of one policy: passes that touch most experts, those that touch a few, and what comes before it is needed."""

    dense: Schedule
    sparse: Schedule
    ahead: Foresight


def keep(policy: Policy) -> Keep:
    """What decides which expert goes first."""
    return Keep.WORTH if policy is Policy.DUOSERVE else Keep.RECENT


def manners(policy: Policy) -> Manners:
    """How its guesses behave."""
    return Manners(waits=True, stays=True) if policy is Policy.LFP else POLITE


def schedules(
    policy: Policy, cache: ExpertCache, transfer: Transfer, experts_per_layer: list[int], think: Think
) -> Schedules:
    """Who schedules. `think` runs a predictor beside the compute."""
    if policy is Policy.LFP:
        whole = WholeLayer(cache, transfer, experts_per_layer)
        return Schedules(whole, whole, whole)
    ahead = Ahead(cache, transfer, experts_per_layer, think)
    return Schedules(Prefill(cache, transfer, experts_per_layer, policy), Decode(transfer, policy, ahead), ahead)
