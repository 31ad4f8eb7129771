"""What each piece of a pass costs on a machine: what a model needs, priced by a machine's profile. Knows plain values; knows
nothing of clocks, schedules or what is resident. The pieces are those that the engine's own threads and streams do.

    trunk     everything between two MoE layers: attention, norms, routers, shared experts; the head behind the last
    expert    one expert's product with so many rows
    combine   what is done once per MoE layer beside its experts

On a GPU the model's thread submits and the stream computes, so a stretch of trunk takes the larger of the two; where the
host is the machine, they add.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from duoserve.core import Phase
from duoserve.estimate import COPIES, Needs
from duoserve.profile import Profile

PREDICT_S = 1e-4  # one ranking by a low-rank head; DuoServe's ExpertMLP takes 0.6 ms


@dataclass(frozen=True)
class MachineCosts:
    """Seconds of each piece. `context`: tokens that decoded tokens look back on; `batch`: sequences in a pass."""

    needs: Needs
    profile: Profile
    context: int
    batch: int = 1
    predict_s: float = PREDICT_S
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        """What stands before MoE layer `layer`; `layer` one behind the last: what follows it, the head."""
        last = layer == len(self.needs.layers)
        at = (0, last, rows, phase is Phase.PREFILL)
        if at not in self._known:
            self._known[at] = self._head_s() if last else self._stretch_s(rows, phase)
        return self._known[at]

    def expert_s(self, layer: int, rows: int) -> float:
        weights = self.needs.layers[layer].weights
        at = (1, weights, rows)
        if at not in self._known:
            host_s = self.profile.cold.expert_s if self.profile.device == "cpu" else 0.0
            self._known[at] = weights * self.profile.weight_s(self.needs.expert_format, rows) + host_s
        return self._known[at]

    def combine_s(self, layer: int, rows: int) -> float:
        """What a MoE layer takes beside its experts: the route's way to the host, groups, sums."""
        return self.profile.cold.layer_s

    @property
    def launch_s(self) -> float:
        """Of the model's thread for what it hands to a GPU; where there is none, an expert's product has it already."""
        return 0.0 if self.profile.device == "cpu" else self.profile.cold.expert_s

    def _head_s(self) -> float:
        head = (part for part in self.needs.trunk if part.last_row_only)
        return sum(part.weights * self.profile.weight_s(part.format, self.batch) for part in head)

    def _stretch_s(self, rows: int, phase: Phase) -> float:
        """The trunk but for its head, spread evenly over the stretches before MoE layers."""
        needs, profile = self.needs, self.profile
        body = (part for part in needs.trunk if not part.last_row_only)
        device_s = sum(part.weights * profile.weight_s(part.format, rows) for part in body)
        device_s += self._attention_s(rows, phase)
        host_s = needs.ops * profile.cold.op_s
        whole_s = device_s + host_s if profile.device == "cpu" else max(device_s, host_s)
        return whole_s / len(needs.layers)

    def _attention_s(self, rows: int, phase: Phase) -> float:
        """Counted for `needs.context` tokens: a prompt's grows with their square, a token's with their number."""
        needs, profile = self.needs, self.profile
        if phase is Phase.PREFILL:
            lengths = rows / self.batch / needs.context
            return self.batch * lengths**2 * needs.prompt_attention_flops / profile.attention.prompt
        one = needs.token_attention_flops / profile.attention.decode + COPIES * needs.kv_bytes / profile.memory
        return rows * self.context / needs.context * one


def limit_s(needs: Needs, profile: Profile, moved: float, passes: int, context: int) -> tuple[float, str]:
    """What `passes` decode passes of one row cannot go below where `moved` bytes had to cross the link, and by what."""
    token_bytes = needs.trunk_bytes + needs.active_bytes + needs.kv_bytes * context / needs.context
    memory_s = passes * token_bytes / profile.memory
    rate = profile.link.pinned if profile.link is not None else max(r.bytes_per_s for r in profile.disk)
    link_s = moved / rate
    return (memory_s, "memory") if memory_s >= link_s else (link_s, "link" if profile.link is not None else "disk")
