"""The command `simulate`: a model known by its config, a machine known by its profile and routes that were recorded or made
go through the real schedules in virtual time. Knows how to put the three together and what to print; the clock is
`simulate.py`'s, the prices are `costing.py`'s. Every figure is a simulation's, none is measured. Imports torch late.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from duoserve import flags
from duoserve.config import POLICIES, parse_share, parse_size, size
from duoserve.core import Phase, Policy, Refusal, nearest

if TYPE_CHECKING:
    from duoserve.core import Step
    from duoserve.estimate import Needs
    from duoserve.profile import Profile
    from duoserve.simulate import Outcome, Pass
    from duoserve.timeline import Timeline

PREDICTOR_BYTES = 300_000_000  # of DuoServe's ExpertMLP, as published; ours has a tenth of that
PAPER_PREDICT_S = 6e-4  # one prediction of it, as published
LATENCY_S = 10e-6  # of one copy beside the wire: a launch and a completion
_GUESSING = (Policy.DUOSERVE, Policy.PAPER)


@dataclass(frozen=True)
class Scene:
    """What is simulated. `link`: bytes/s instead of the profile's pinned rate; `recall`: of a predictor, None for none."""

    needs: Needs
    profile: Profile
    policy: Policy
    slots: int
    link: float | None = None
    recall: float | None = None
    always: bool = False
    predict_s: float | None = None
    context: int = 512  # tokens that decoded tokens look back on, on average
    batch: int = 1

    @property
    def experts(self) -> int:
        return sum(layer.experts for layer in self.needs.layers)

    @property
    def predictor_bytes(self) -> int:
        """On the device: as published, or a tenth of it for what the program ships."""
        if self.recall is None or self.policy not in _GUESSING:
            return 0
        return PREDICTOR_BYTES if self.policy is Policy.PAPER else PREDICTOR_BYTES // 10

    @property
    def memory_bytes(self) -> int:
        """Of trunk, slots and predictor."""
        slab = max(layer.slab_bytes for layer in self.needs.layers)
        return self.needs.trunk_bytes + self.slots * slab + self.predictor_bytes

    @property
    def rate(self) -> float:
        """Bytes/s of the way to the slots."""
        if self.profile.link is not None:
            return self.link or self.profile.link.pinned
        return self.link or self.profile.disk_rate(self.needs.layers[0].slab_bytes, 2)


@dataclass(frozen=True)
class Figures:
    """What a simulated run took, and what it could not go below."""

    prompt_s: float | None  # the first pass, if it was a prompt: time to first token
    tokens_per_s: float | None  # decoded, of all sequences together
    total_s: float
    hits: int
    in_flight: int
    misses: int
    guesses: int
    bytes_per_token: float | None  # over the link, in decode
    moved_bytes: int
    link_busy: float  # share of the time
    stalled: float  # share of the time in which nothing was computed: experts were waited for, or the host
    stall_s: dict[str, float]
    limit_tokens_per_s: float | None
    limited_by: str
    share_of_limit: float | None
    slots: int
    residency: float
    memory_bytes: int  # trunk, slots, and the predictor's where there is one


def play(scene: Scene, passes: Sequence[Pass], timeline: Timeline | None = None) -> Figures:
    """Simulate, and set what came of it beside its limit."""
    return _figures(scene, passes, split(scene, passes, timeline))


class Played(NamedTuple):
    """What the first pass took alone, where it is a prompt, what all took, and how long something was computed."""

    prompt: Outcome | None
    all: Outcome
    compute_s: float


def split(scene: Scene, passes: Sequence[Pass], timeline: Timeline | None = None) -> Played:
    """Simulate."""
    from duoserve.future import Future
    from duoserve.simulate import Link, Shape, Simulation, undisturbed

    needs = scene.needs
    experts = tuple(layer.experts for layer in needs.layers)
    shape = Shape(experts, tuple(layer.slab_bytes for layer in needs.layers), scene.slots)
    costs = _costs(scene)
    link = Link(scene.rate, LATENCY_S)
    simulation = Simulation(
        shape, costs, link, scene.policy, predictor=_predictor(scene, passes, experts), always=scene.always,
        asynchronous=scene.profile.device != "cpu",
    )  # fmt: skip
    if scene.policy is Policy.BELADY:
        simulation.runtime.foresee(Future(experts, ([list(tokens) for tokens in one.chosen] for one in passes)))
    first = None
    if timeline is not None:
        simulation.runtime.record(timeline)
    with undisturbed():
        for number, one in enumerate(passes):
            simulation.run(one)
            if number == 0 and one.phase is Phase.PREFILL:
                first = simulation.outcome()
    if timeline is not None:
        simulation.runtime.record(None)
    return Played(first, simulation.outcome(), simulation.device.compute.busy_s)


def _costs(scene: Scene) -> Any:
    from duoserve.costing import PREDICT_S, MachineCosts

    paper = scene.policy is Policy.PAPER
    predict_s = scene.predict_s or (PAPER_PREDICT_S if paper else PREDICT_S)
    return MachineCosts(scene.needs, scene.profile, scene.context, scene.batch, predict_s)


def _predictor(scene: Scene, passes: Sequence[Pass], experts: Sequence[int]) -> Any:
    if scene.recall is None or scene.policy not in _GUESSING:
        return None
    from predictor.stated import StatedPredictor

    steps = (one.step for one in passes if one.step is not None)
    return StatedPredictor(steps, experts, scene.recall, n_bytes=scene.predictor_bytes)


def _figures(scene: Scene, passes: Sequence[Pass], played: Played) -> Figures:
    from duoserve.costing import limit_s

    prompt, all_, compute_s = played
    counts, before = all_.counts, prompt.counts if prompt else None
    decode_s = all_.total_s - (prompt.total_s if prompt else 0.0)
    moved = all_.moved_bytes - (prompt.moved_bytes if prompt else 0)
    steps = len(passes) - (prompt is not None)
    tokens = steps * scene.batch
    limit, by = limit_s(scene.needs, replace_link(scene.profile, scene.rate), moved, steps, scene.context)
    return Figures(
        prompt_s=prompt.total_s if prompt else None,
        tokens_per_s=tokens / decode_s if tokens else None,
        total_s=all_.total_s,
        hits=counts.hits - (before.hits if before else 0),
        in_flight=counts.in_flight - (before.in_flight if before else 0),
        misses=counts.misses - (before.misses if before else 0),
        guesses=counts.guesses - (before.guesses if before else 0),
        bytes_per_token=moved / tokens if tokens else None,
        moved_bytes=all_.moved_bytes,
        link_busy=all_.moved_bytes / scene.rate / all_.total_s,
        stalled=max(0.0, 1 - compute_s / all_.total_s),
        stall_s=dict(all_.stalls),
        limit_tokens_per_s=tokens / limit if tokens and limit else None,
        limited_by=by,
        share_of_limit=limit / decode_s if tokens else None,
        slots=scene.slots,
        residency=scene.slots / scene.experts,
        memory_bytes=scene.memory_bytes,
    )


def replace_link(profile: Profile, rate: float) -> Profile:
    """The same machine with another way to the slots."""
    if profile.link is not None:
        return replace(profile, link=profile.link._replace(pinned=rate))
    return replace(profile, disk=tuple(one._replace(bytes_per_s=rate) for one in profile.disk))


def generated(
    name: str, needs: Needs, prompt: int, new: int, batch: int, seed: int, like: Path | None = None
) -> list[Pass]:
    """Passes of `batch` sequences with the habits of the model `name` or the one most like it, or of the trace `like`."""
    from traces.generate import Shape, fit_trace, generate, law_of, passes
    from traces.store import Traces

    shape = Shape(tuple(layer.experts for layer in needs.layers), tuple(layer.choices for layer in needs.layers))
    law, popularity_LE = law_of(name, shape), None
    if like is not None:
        _same_model(like, Traces(like).about, needs)
        fitted = fit_trace(Traces(like))
        law, popularity_LE = fitted.law, fitted.popularity_LE
    # a prompt's pass makes the first token, so new tokens take one pass less where there is a prompt
    tokens = prompt + new - (prompt > 0)
    made = [generate(law, shape, tokens, seed * batch + at, popularity_LE) for at in range(batch)]
    return [as_pass(step, shape.experts) for step in passes(made, prompt)]


def recorded(folder: Path, needs: Needs) -> list[Pass]:
    """Passes of a trace's sequences, one after the other."""
    from traces.generate import replayed
    from traces.store import Traces

    traces = Traces(folder)
    _same_model(folder, traces.about, needs)
    found: list[Pass] = []
    for one in traces.sequences(hidden=False):
        for step in replayed(one):
            step.index = len(found)
            found.append(as_pass(step, traces.about.experts))
    return found


def _same_model(folder: Path, about: Any, needs: Needs) -> None:
    wanted = [(layer.experts, layer.choices) for layer in needs.layers]
    if wanted != list(zip(about.experts, about.choices, strict=True)):
        theirs = f"{len(about.experts)} layers of {max(about.experts)} experts"
        what = f"{folder} is of {theirs}, the model has {len(wanted)} of {max(e for e, _ in wanted)}"
        raise Refusal("E_TRACE", what, "name the model that was traced")


def as_pass(step: Step, experts: Sequence[int]) -> Pass:
    """A Step as the clock runs it: of each layer which experts, in the order of their ids, and by how many rows."""
    import numpy as np

    from duoserve.simulate import Pass

    chosen = []
    for route in step.routes:
        ids, rows = np.unique(route.ids_TK.numpy(), return_counts=True)
        real = ids < experts[route.layer]
        chosen.append(dict(zip(ids[real].tolist(), rows[real].tolist(), strict=True)))
    return Pass(step.phase, step.rows, chosen, step)


def known_needs(model: str | None, experts: str | None, trunk: str | None) -> tuple[str, Needs]:
    """Of a model that comes by name, or of whatever `plan` takes."""
    from duoserve.specimens import SPECIMENS, needs_of

    if model in SPECIMENS:
        return str(model), needs_of(str(model), experts, trunk)
    from duoserve.outlook import look

    try:
        found = look(model, format=experts, trunk=trunk, budget="min")
    except Refusal as refusal:
        if model is not None and refusal.code == "E_MODEL" and not Path(model).exists():
            raise Refusal(
                "E_MODEL", str(refusal).split("; ")[0].removeprefix("E_MODEL: "), nearest(model, list(SPECIMENS)), 3
            ) from refusal
        raise
    if found.needs is None:
        raise Refusal("E_ESTIMATE", f"what {model or 'the demo'} needs cannot be counted", "simulate a model by name")
    return model or "demo", found.needs


def known_machine(name: str, cache_dir: str | None) -> Profile:
    from duoserve.fleet import HERE, machine

    if name != HERE:
        return machine(name)
    from duoserve.doctor import known_profile

    found, why = known_profile(cache_dir)
    if found is None:
        what = (why or "no machine profile").removeprefix("E_PROFILE: ").split("; ")[0]
        raise Refusal("E_PROFILE", what, "run `duoserve doctor`, or name another --machine", 3)
    return found


def simulate(
    model: Annotated[
        str | None,
        typer.Argument(help="mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b and others by name; or as for `plan`."),
    ] = None,
    machine: Annotated[
        str, typer.Option("--machine", "-m", help="a5000, a6000, rtx4090, rtx5090, h200, here, or a profile's file.")
    ] = "here",
    policy: Annotated[str, typer.Option("--policy", help=f"{', '.join(POLICIES)}.")] = "duoserve",
    slots: Annotated[int | None, typer.Option(min=1, help="Experts that fit on the device.")] = None,
    residency: Annotated[str, typer.Option(help="The same as a share of all experts; used without --slots.")] = "50%",
    trace: Annotated[Path | None, typer.Option("--trace", help="Replay a folder that `duoserve trace` made.")] = None,
    like: Annotated[
        Path | None,
        typer.Option("--like", help="Make routes with the habits of this trace, instead of published ones."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Of generated routes: tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of generated routes: tokens that are made.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that run together.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of generated routes.")] = 0,
    recall: Annotated[
        float | None,
        typer.Option("--predictor-recall", min=0.0, max=1.0, help="Guess with a predictor of this slot recall."),
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Bytes per second to the slots, such as 10GB. Default: the machine's, pinned.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Experts as int4, nf4, fp8 or bf16. Default: the model's.")] = None,
    trunk: Annotated[str | None, typer.Option(help="Trunk as int4, nf4 or bf16. Default: the model's.")] = None,
    timeline: flags.TimelineFile = None,
    as_json: flags.AsJson = False,
    cache_dir: Annotated[str | None, typer.Option(help="Where `doctor` left this machine's profile.")] = None,
) -> None:
    """What a model would do on a machine that is not here: the same schedules in virtual time. Measures nothing."""
    if policy not in POLICIES:
        raise Refusal("E_OPTION", f"policy {policy!r} is unknown", nearest(policy, list(POLICIES)))
    rate = float(parse_size(link, "link")) if link is not None else None
    share = parse_share(residency, "residency")
    profile = known_machine(machine, cache_dir)
    name, needs = known_needs(model, format, trunk)
    experts = sum(layer.experts for layer in needs.layers)
    fitting = min(experts, slots or max(2, round(share * experts)))
    if not profile.knows(needs.expert_format):
        raise Refusal(
            "E_OPTION", f"{machine} has no rate for {needs.expert_format}, 1 is needed", "choose another --format"
        )
    if trace is not None:
        passes, context = recorded(trace, needs), 512
    else:
        passes, context = (
            generated(name, needs, prompt_tokens, new_tokens, batch, seed, like),
            prompt_tokens + new_tokens // 2,
        )
    scene = Scene(needs, profile, Policy(policy), fitting, rate, recall, context=context, batch=batch)
    found = _recorded(scene, passes, timeline, name, machine) if timeline is not None else play(scene, passes)
    if as_json:
        about = {"simulated": True, "model": name, "machine": machine, "policy": policy, "link_bytes_per_s": scene.rate}
        routes = str(trace) if trace is not None else "generated"
        print(json.dumps(about | {"routes": routes, "passes": len(passes), "recall": recall} | asdict(found)))
        return
    for what, says in table(scene, found, name, machine):
        print(f"{what:18s}{says}")


def _recorded(scene: Scene, passes: Sequence[Pass], path: Path, name: str, machine: str) -> Figures:
    """Simulate, and write what happened when."""
    flags.check_targets(path)
    from duoserve.runfile import Run, write_run
    from duoserve.timeline import Timeline

    timeline = Timeline()
    found = play(scene, passes, timeline)
    meta = {"simulated": "yes", "model": name, "policy": scene.policy.value, "slots": str(scene.slots)}
    write_run(path, Run.of(timeline, meta, scene.profile.machine | {"simulated": machine}))
    print(f"recorded {path}: `duoserve timeline {path} --png picture.png` shows it", file=sys.stderr)
    return found


def table(scene: Scene, found: Figures, name: str, machine: str) -> Iterator[tuple[str, str]]:
    """Rows for people."""
    yield "simulated", f"{name} on {machine}, policy {scene.policy.value}: no measurement"
    yield (
        "slots",
        f"{found.slots} of {scene.experts} experts ({found.residency:.0%}), {size(found.memory_bytes)} with trunk",
    )
    if found.prompt_s is not None:
        yield "first token", f"{1e3 * found.prompt_s:,.1f} ms"
    if found.tokens_per_s is None or found.bytes_per_token is None or found.share_of_limit is None:
        return
    asked = max(1, found.hits + found.in_flight + found.misses)
    shares = [f"{n / asked:.1%}" for n in (found.hits, found.in_flight, found.misses)]
    yield "decode", f"{found.tokens_per_s:,.1f} tokens/s"
    limit = f"{found.limit_tokens_per_s:,.1f} tokens/s" if found.limit_tokens_per_s else "none"
    yield "its limit", f"{limit} ({found.limited_by}); reached {found.share_of_limit:.0%}"
    yield "experts asked", f"hits {shares[0]}, in flight {shares[1]}, misses {shares[2]}; {found.guesses} guesses begun"
    yield "a token moves", f"{size(math.ceil(found.bytes_per_token))} over {scene.rate / 1e9:.1f} GB/s"
    yield "link busy", f"{found.link_busy:.0%} of the time; nothing computed in {found.stalled:.0%} of it"
    if any(found.stall_s.values()):
        yield "host waited for", ", ".join(f"{cause} {seconds:.2f} s" for cause, seconds in found.stall_s.items())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(simulate)
