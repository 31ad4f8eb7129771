"""What a lost rank costs: expert ranks killed at random moments of a generation, and whether the tokens stay those of one
process. Prints one JSON line.

    python -m benchmarks.dep_faults [--model FOLDER] [--kills 20 --attention-ranks 2 --expert-ranks 6 --replicas 1]
    python -m benchmarks.dep_faults --scenes      an attention rank killed and stopped, an expert rank stopped

One launch starts all ranks and generates again and again, the same prompts each time. The first generation is undisturbed
and says how long one takes, the last is as well; in each between them an expert rank is killed (kill -9, itself, not its
launcher) at a random moment, until one is left; then ranks are launched anew. Detection: from the kill until the last
survivor knows; stall: until the last survivor walks on, experts taken over and, with --solve, the plan solved again (by the
costs of FinDEP's machine A). A launch that takes longer than --bound seconds hangs, and is counted so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import describe
from dep_extension.comm import PeerLost, Place, Role
from dep_extension.faults import LEFT, Bounds
from dep_extension.launch import Job as Launch
from dep_extension.launch import dies_with, supervise

BEAT_S, STALL_S = 0.1, 5.0
SPREAD = ("detection_s", "stall_s", "solved_s", "longer_s", "rows_again")


@dataclass(frozen=True)
class Job:
    """What every rank of a launch does. `model` None: the demo."""

    model: str | None
    cache: str | None
    ag: int
    eg: int
    replicas: int
    r1: int
    r2: int
    samples: int
    new: int
    generations: int
    solve: bool = False

    @property
    def tokens(self) -> int:
        """Made in a generation."""
        return self.ag * self.r1 * self.samples * self.new

    def prompts(self, rank: int) -> list[torch.Tensor]:
        """Of an attention rank, ids (B, S) of each of its micro-batches."""
        generator = torch.Generator().manual_seed(rank)
        return [torch.randint(3, 60, (self.samples, 6 + 3 * i), generator=generator) for i in range(self.r1)]


def generate(model: Any, ids_BS: torch.Tensor, new: int) -> list[list[int]]:
    """Greedy, always as many tokens."""
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    found: list[list[int]] = model.generate(
        input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), **options
    ).tolist()
    return found


def replan(job: Job) -> Any:
    """How the plan is solved again; by a machine's costs that have nothing to do with this one's."""
    from dep_extension import testbeds
    from dep_extension.cost import Split
    from dep_extension.recovery import solved_again
    from dep_extension.solver import Problem, findep
    from duoserve.depsubject import known_model

    if not job.solve:
        return None
    problem = Problem(known_model(job.model, "A"), testbeds.named("A"), 512, job.ag * job.r1 * job.samples)
    plan = findep(problem, Split(job.ag, job.eg))
    assert plan is not None, "it fits"
    return solved_again(problem, plan)


# A rank


def rank(folder: Path) -> int:
    """All generations of one rank; what it made and when is written to files."""
    from dep_extension.executor import AttentionSide, Course, ExpertSide, open_store
    from dep_extension.recovery import Company
    from dep_extension.walk import Itinerary
    from dep_extension.world import here, open_world
    from duoserve.config import EngineConfig
    from duoserve.device import open_device

    job = read_job(folder)
    torch.set_num_threads(1)
    place = here(job.ag, job.eg)
    opened = open_store(job.model, EngineConfig.of(dtype="float32", cache_dir=job.cache))
    device = open_device("cpu")
    itinerary = Itinerary.of(len(opened.store.layers), job.r1, job.r2)
    course = Course(job.ag, job.eg, tuple(opened.shares(job.eg, job.replicas)), itinerary)
    sequences, peers = job.samples * job.r1, job.ag + job.eg
    bounds = Bounds(beat=BEAT_S, stall=STALL_S, join=30, form=60)
    world = open_world(place, opened.dtype, bounds=bounds)
    company = Company(world, course, replan(job))
    company.side = side = (
        AttentionSide(opened, device, world.place, company.course, sequences, peers)
        if place.role is Role.ATTENTION
        else ExpertSide(opened, device, world.place, company.course, peers)
    )
    note(folder, f"pid-{place.rank}", os.getpid())
    try:
        for number in range(job.generations):
            known = len(company.outages)
            company.tell("ready")
            began = time.time()
            note(folder, f"began-{number}-{place.rank}", began)
            made: list[Any] = []
            again = 0
            if isinstance(side, AttentionSide):
                again = side.hub.rows_again
                works = [partial(generate, side.model, ids_BS, job.new) for ids_BS in job.prompts(place.index)]
                made = company.attend(works)
                again = side.hub.rows_again - again
            else:
                company.serve()
            outages = [one._asdict() for one in company.outages[known:]]
            found = {"made": made, "began": began, "ended": time.time(), "outages": outages, "rows_again": again}
            note(folder, f"made-{number}-{place.rank}", found)
        company.last_words("")
        world.close()
    except PeerLost as lost:
        note(folder, f"lost-{place.rank}", {"at": time.time(), "ranks": lost.ranks, "why": str(lost)})
        print(lost, file=sys.stderr, flush=True)
        world.abandon()
        return LEFT
    return 0


def note(folder: Path, name: str, value: Any) -> None:
    part = folder / f"{name}.{os.getpid()}"
    part.write_text(json.dumps(value))
    part.replace(folder / name)


def read_job(folder: Path) -> Job:
    return Job(**json.loads((folder / "job").read_text()))


def launch(folder: Path) -> int:
    job = read_job(folder)
    command = (sys.executable, "-m", "benchmarks.dep_faults", "--rank", str(folder))
    bounds = Bounds(beat=BEAT_S, stall=STALL_S)
    return supervise(Launch(command, job.ag, job.eg, tuple(range(job.ag + job.eg)), threads=1, bounds=bounds))


# Who ends ranks, and looks what became of it


class Ended(NamedTuple):
    """`status` None: it hung."""

    status: int | None
    err: str


class Launched:
    """A launcher with its ranks, and the folder of what they say."""

    def __init__(self, job: Job, folder: Path, bound_s: float):
        self.job, self.folder, self.until = job, folder, time.monotonic() + bound_s
        note(folder, "job", asdict(job))
        self.err = open(folder / "err", "w+")
        command = [sys.executable, "-m", "benchmarks.dep_faults", "--launch", str(folder)]
        none, with_us = subprocess.DEVNULL, dies_with(os.getpid())
        self.process = subprocess.Popen(command, stdin=none, stdout=self.err, stderr=self.err, preexec_fn=with_us)

    def read(self, name: str) -> Any:
        """What a rank noted, once it has; None where the launch ended or hung before."""
        while not (self.folder / name).exists():
            if time.monotonic() > self.until or self.process.poll() is not None:
                return None
            time.sleep(0.002)
        return json.loads((self.folder / name).read_text())

    def all(self, name: str, ranks: Sequence[int]) -> list[Any]:
        return [self.read(f"{name}-{number}") for number in ranks]

    def send(self, number: int, what: signal.Signals) -> float:
        """When."""
        process, at = self.read(f"pid-{number}"), time.time()
        if process is None:
            raise RuntimeError(f"rank {number} did not begin: {self.end()}")
        os.kill(process, what)
        return at

    def end(self) -> Ended:
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(max(0.0, self.until - time.monotonic()))
        self.process.kill()
        self.process.wait()
        self.err.seek(0)
        return Ended(status, self.err.read())


@contextlib.contextmanager
def launched(job: Job, bound_s: float) -> Iterator[Launched]:
    with tempfile.TemporaryDirectory() as folder:
        run = Launched(job, Path(folder), bound_s)
        try:
            yield run
        finally:
            run.process.kill()
            run.process.wait()
            run.err.close()


class Kill(NamedTuple):
    """One killed expert rank. Seconds; `solved`: of the stall, to solve the plan again; `longer`: than undisturbed;
    `rows_again`: that attention ranks sent a second time in the generation that met it; `wrong`: sequences unlike those of
    one process."""

    rank: int
    moment_s: float
    detection_s: float
    stall_s: float
    solved_s: float
    longer_s: float
    taken_over: int
    rows_again: int
    wrong: int


def reference(job: Job) -> list[Any]:
    """What one process makes of every attention rank's prompts."""
    import duoserve

    engine = duoserve.load(job.model, dtype="float32", cache_dir=job.cache)
    try:
        return [[generate(engine.model, ids, job.new) for ids in job.prompts(a)] for a in range(job.ag)]
    finally:
        engine.close()


class Few(NamedTuple):
    """What one launch came to; `wrong`: sequences in all of it; `seconds`: of its first generation and its last, neither of
    them disturbed, by all expert ranks and by those that were left."""

    kills: list[Kill]
    ended: Ended
    wrong: int
    seconds: tuple[float, float] | None


def some_kills(job: Job, rng: random.Random, want: list[Any], bound_s: float) -> Few:
    """One launch: a kill in every generation but the first and the last."""
    with launched(job, bound_s) as run:
        attention = list(range(job.ag))
        alive = list(range(job.ag, job.ag + job.eg))
        first = [one for one in run.all("made-0", [*attention, *alive]) if one is not None]
        usual = statistics.median(one["ended"] - one["began"] for one in first) if first else 0.0
        events = []
        for number in range(1, job.generations - 1):
            began = run.read(f"began-{number}-0")
            if began is None:
                break
            moment = rng.uniform(0, usual)
            time.sleep(max(0.0, began + moment - time.time()))
            killed = alive.pop(rng.randrange(len(alive)))
            events.append((number, killed, moment, run.send(killed, signal.SIGKILL), [*attention, *alive]))
            run.all(f"made-{number}", attention)
        ended = run.end()
        met = [_kill(run, event, usual, want) for event in events] if ended.status == 0 else []
        kills = [kill for kill in met if kill is not None]
        made = [run.read(f"made-{number}-{a}") for number in range(job.generations) for a in attention]
        wrong = sum(_wrong(one, want[k % job.ag]) for k, one in enumerate(made))
        took = [one["ended"] - one["began"] for one in made if one is not None]
        return Few(kills, ended, wrong, (usual, max(took[-job.ag :])) if ended.status == 0 else None)


def _kill(run: Launched, event: Any, usual: float, want: list[Any]) -> Kill | None:
    """A loss is met in the generation that runs when the kill comes: that of its number, or a later one where those after
    the first are quicker. None where it came when all was made."""
    number, killed, moment, at, survivors = event
    outages, ended, again = [], [], 0
    for g in range(number, run.job.generations):
        found = [one for survivor in survivors if (one := run.read(f"made-{g}-{survivor}")) is not None]
        ended += [one["ended"] for one in found]
        outages += [one for each in found for one in each["outages"] if killed in one["ranks"]]
        again += sum(one["rows_again"] for one in found if any(killed in each["ranks"] for each in one["outages"]))
    if not outages and at > max(ended):
        return None
    assert outages, f"rank {killed} was killed at {at}, nobody noticed, and all went on until {max(ended)}"
    made = [run.read(f"made-{number}-{a}") for a in range(run.job.ag)]
    return Kill(
        killed,
        moment,
        max(one["noticed"] for one in outages) - at,
        max(one["resumed"] for one in outages) - at,
        max(one["solved_s"] for one in outages),
        max(one["ended"] - one["began"] for one in made) - usual,
        sum(one["taken_over"] for one in outages),
        again,
        sum(_wrong(one, want[a]) for a, one in enumerate(made)),
    )


def _wrong(made: Any, want: list[list[list[int]]]) -> int:
    """Sequences; all of them where there is nothing."""
    got = made["made"] if made is not None else [[None] * len(batch) for batch in want]
    return sum(a != b for mine, theirs in zip(got, want, strict=True) for a, b in zip(mine, theirs, strict=True))


def many_kills(job: Job, kills: int, seed: int, bound_s: float) -> dict[str, Any]:
    """Launches until so many expert ranks were killed."""
    rng, want = random.Random(seed), reference(job)
    found: list[Kill] = []
    seconds: list[tuple[float, float]] = []
    hangs = failed = wrong = launches = 0
    while len(found) < kills and launches < 2 * kills:
        few = some_kills(job, rng, want, bound_s)
        found += few.kills
        seconds += [few.seconds] if few.seconds is not None else []
        launches += 1
        hangs += few.ended.status is None
        failed += few.ended.status not in (None, 0)
        wrong += few.wrong
        if few.ended.status != 0:
            print(few.ended.err, file=sys.stderr)
    return {
        "kills": len(found),
        "launches": launches,
        "hangs": hangs,
        "failed": failed,
        "wrong_sequences": wrong,
        "sequences": launches * job.ag * job.generations * job.r1 * job.samples,
        **{name: _spread([getattr(kill, name) for kill in found]) for name in SPREAD},
        "tokens_per_s": {
            name: job.tokens / statistics.median(each)
            for name, each in zip(("all", "left"), zip(*seconds, strict=True), strict=False)
        },
        "each": [kill._asdict() for kill in found],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "worst": max(values)} if values else {}


def scene(job: Job, number: int, what: signal.Signals, bound_s: float) -> dict[str, Any]:
    """A rank is killed or stopped in the first generation: how the launch ended, and how soon."""
    with launched(job, bound_s) as run:
        run.all("began-0", range(job.ag + job.eg))
        time.sleep(0.3)
        at = run.send(number, what)
        ended = run.end()
        took = time.time() - at
        place = Place.of(number, job.ag, job.eg)
        lines = [line for line in ended.err.splitlines() if f"{place} (rank {number})" in line]
        return {
            "rank": str(place),
            "signal": what.name,
            "status": ended.status,
            "ended_after_s": took,
            "named": bool(lines),
            "said": lines[:1],
        }


def scenes(job: Job, bound_s: float) -> list[dict[str, Any]]:
    """An attention rank killed, stopped; an expert rank stopped: that one the others outlive."""
    events = [(job.ag - 1, signal.SIGKILL), (job.ag - 1, signal.SIGSTOP), (job.ag, signal.SIGSTOP)]
    return [scene(job, number, what, bound_s) for number, what in events]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint or store; the demo by default")
    parser.add_argument("--cache", help="where stores are kept")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--attention-ranks", type=int, default=2)
    parser.add_argument("--expert-ranks", type=int, default=6)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bound", type=float, default=120.0, help="seconds after which a launch hangs")
    parser.add_argument("--solve", action="store_true", help="solve the plan again after each loss")
    parser.add_argument("--scenes", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--launch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank or options.launch:
        sys.exit(rank(options.rank) if options.rank else launch(options.launch))
    ag, eg = options.attention_ranks, options.expert_ranks
    generations = 1 if options.scenes else min(eg - 1, options.kills) + 2  # the last shows who was killed too late
    job = Job(
        options.model, options.cache, ag, eg, options.replicas, 2, 2, 2, options.new_tokens, generations, options.solve
    )
    found: dict[str, Any] = {"benchmark": "dep_faults", "job": asdict(job), "beat_s": BEAT_S, "stall_bound_s": STALL_S}
    if options.scenes:
        found["scenes"] = scenes(job, options.bound)
    else:
        found |= many_kills(job, options.kills, options.seed, options.bound)
    print(json.dumps(found | {"machine": describe()}))


if __name__ == "__main__":
    main()
