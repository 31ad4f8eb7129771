"""The command `bench`: policies, residencies, prompt sets and batches side by side, with peers and with the physical limit.
Knows options; has contenders made by `matrix` and run by `contest`, figures made by `tally`, shown by `board`. Imports torch
late.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve import results
from duoserve.board import compared, table
from duoserve.config import POLICIES, EngineConfig, parse_share, parse_size, size
from duoserve.contest import PHASES, Contender, Course, Stop, Stopped, compete, stoppable
from duoserve.core import Refusal, nearest
from duoserve.matrix import Matrix, Subject, our_contenders, peer_contenders, study, takes
from duoserve.peers import chosen
from duoserve.prompts import prompt_set

if TYPE_CHECKING:
    from duoserve.profile import Profile

ROUTES = ("real", "uniform")
STEADY = 3  # requests of a repetition
MAX_BATCH, MAX_NEW = 1024, 1 << 20
Model = Annotated[
    str | None, typer.Argument(help="Hub id, checkpoint folder or expert store; the bundled demo if left out.")
]


def bench(
    model: Model = None,
    policies: Annotated[str, typer.Option(help="Such as duoserve,lru,on-demand; or none.")] = "duoserve,lru,on-demand",
    residency: Annotated[str, typer.Option(help="Shares of the experts that have a slot.")] = "25%,50%",
    prompts: Annotated[
        str, typer.Option(help="all (one of each set in turn), prose, code, questions, or files; several with commas.")
    ] = "all",
    batch: Annotated[str, typer.Option(help="Sequences that run together, such as 1,4.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens made for each prompt, end or no end.")] = 32,
    repetitions: Annotated[int, typer.Option(help="Each loads anew: cold, warm and steady requests.")] = 3,
    cap: Annotated[
        str | None, typer.Option(help="Memory of each process, such as 900MB, page cache included; needs root.")
    ] = None,
    peers: Annotated[str, typer.Option(help="none, all that are installed, or stock,accelerate.")] = "none",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines there.")] = None,
    compare: Annotated[Path | None, typer.Option(help="A file that --output wrote: ratios to it.")] = None,
    routes: Annotated[
        str, typer.Option(help="real, or uniform: random weights repeat themselves. Peers keep theirs.")
    ] = "real",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of the table.")] = False,
    format: Annotated[str | None, typer.Option(help="Experts as int4 (default), nf4 or bf16.")] = None,
    trunk: Annotated[str | None, typer.Option(help="Trunk as int4 (default on the CPU), nf4 or bf16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Arithmetic: bfloat16, float32 or float16.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    predictor: Annotated[str | None, typer.Option(help="What guesses for duoserve, as for `chat`.")] = None,
    link: Annotated[str | None, typer.Option(help="Slow our copies to so many bytes per second.")] = None,
    limit_tokens: Annotated[int | None, typer.Option(min=1, help="Cut prompts to this many tokens.")] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where converted stores are kept.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of arithmetic.")] = None,
    kernels: Annotated[
        Path | None, typer.Option("--kernels", help="What `dep kernels` measured here, as for `chat`.")
    ] = None,
) -> None:
    """Compare policies, residencies and peers on real prompts: latency, speed, bytes, stalls, beside the physical limit."""
    options: dict[str, Any] = {"format": format, "trunk": trunk, "dtype": dtype, "device": device, "link": link}
    options |= {"cache_dir": cache_dir, "threads": threads, "kernels": str(kernels) if kernels is not None else None}
    EngineConfig.of(**options)  # refuse before torch is imported, as all of this
    matrix = Matrix(
        policies=_policies(policies),
        residencies=_shares(residency),
        sets=[prompt_set(name.strip()) for name in prompts.split(",")],
        batches=[_number("batch", text, MAX_BATCH) for text in batch.split(",")],
        peers=chosen(peers),
        cap=_cap(cap),
        routes=_one_of("routes", routes, ROUTES),
        course=Course(_number("repetitions", repetitions, 1000), STEADY, _number("new-tokens", new_tokens, MAX_NEW, 2)),
        limit_tokens=limit_tokens,
        predictor=predictor,
    )
    if not matrix.policies and not matrix.peers:
        raise Refusal("E_OPTION", "0 policies and 0 peers are to be run", "name some: --policies duoserve")
    before = results.read(compare) if compare is not None else None
    if output is not None and not output.absolute().parent.is_dir():
        raise Refusal("E_IO", f"there is no folder {output.absolute().parent}", "give one that is there")
    if output is not None and output.is_dir():
        raise Refusal("E_IO", f"{output} is a folder", "give a file's name")
    found, status = _until_stopped(model, matrix, options)
    if output is not None:
        results.write(output, found)
    for text in (results.line(r) for r in found) if as_json else table(found):
        print(text)
    if before is not None:
        for text in compared(found, before):
            print(text, file=sys.stderr if as_json else sys.stdout)
    if status:
        raise typer.Exit(status)


class Unfinished(Exception):
    """A signal stopped the benchmark; the rows of what was answered until then."""

    def __init__(self, number: int, rows: list[results.Record]):
        super().__init__(number, rows)
        self.number, self.rows = number, rows


def _until_stopped(model: str | None, matrix: Matrix, options: dict[str, Any]) -> tuple[list[results.Record], int]:
    """Rows, and the exit status: 0, or 128 and the signal that stopped it."""
    with stoppable():
        try:
            return measure(model, matrix, options, _say), 0
        except Unfinished as cut:
            _say(f"stopped by signal {cut.number}; of {matrix.course.repetitions} repetitions, those that were over:")
            return cut.rows, 128 + cut.number
        except Stop as stop:
            _say(f"stopped by signal {stop.number} before the first repetition")
            return [], 128 + stop.number


def measure(
    model: str | None, matrix: Matrix, options: dict[str, Any], say: Callable[[str], None]
) -> list[results.Record]:
    """Rows of results, contender by contender. `options`: format, trunk, dtype, device, link, cache_dir, threads."""
    say("opening the model")
    subject = study(model, matrix, options)
    profile = _profile(options.get("cache_dir"), say)
    contenders = [*our_contenders(subject, matrix, options), *peer_contenders(subject, matrix, options)]
    return run(subject, contenders, matrix, profile, options, say)


def run(
    subject: Subject,
    contenders: Sequence[Contender],
    matrix: Matrix,
    profile: Profile | None,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> list[results.Record]:
    """Let these contenders run the matrix's prompt sets and batches; its policies and peers are not looked at.

    Raises `Unfinished` where somebody stopped it.
    """
    from duoserve.tally import Setting, record

    in_turns = _fit_together(contenders, subject, say)
    setting = Setting(
        model=subject.name,
        machine=_machine(),
        build=_build(),
        checksums={s.name: s.sha256 for s in matrix.sets},
        in_turns=in_turns,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        new_tokens=matrix.course.new_tokens,
        profile=profile,
        needs=subject.needs,
        peer_needs=subject.peer_needs,
        link=parse_size(options["link"], "link") if options.get("link") else None,
    )
    try:
        outcomes = compete(contenders, subject.cells, matrix.course, in_turns, say)
    except Stopped as stopped:
        rows = [record(outcome, phase, setting) for outcome in stopped.outcomes for phase in PHASES]
        raise Unfinished(stopped.number, rows) from stopped
    return [record(outcome, phase, setting) for outcome in outcomes for phase in PHASES]


def _fit_together(contenders: Sequence[Contender], subject: Subject, say: Callable[[str], None]) -> bool:
    from duoserve.system import available_ram

    needed, free = sum(takes(one, subject) for one in contenders), available_ram()
    if needed > free:
        say(f"{len(contenders)} rows take {size(needed)}, {size(free)} are free: each runs alone, one after the other")
    return needed <= free


def _profile(cache_dir: str | None, say: Callable[[str], None]) -> Profile | None:
    """What this machine does in a second, for the limit; None where it cannot be measured."""
    from duoserve import doctor

    known, why = doctor.known_profile(cache_dir)
    if known is not None:
        return known
    say(f"measuring this machine for a few seconds: {why}")
    try:
        return doctor.quick_profile(cache_dir)
    except Refusal as refusal:
        say(f"no limits: {refusal}")
        return None


def _machine() -> dict[str, str | None]:
    from duoserve import doctor

    about = doctor.identity() | {"ram": size(doctor.memory()["total_bytes"])}
    return about | {name: value for name, value in doctor.versions().items() if name not in about}


def _build() -> dict[str, Any]:
    """Of the checkout that this program runs from, if it is one."""
    commit = _git("rev-parse", "--short", "HEAD")
    number = _git("rev-list", "--count", "HEAD")
    return {"build_commit": commit, "build_number": int(number) if number else None}


def _git(*args: str) -> str | None:
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _policies(text: str) -> list[str]:
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    return [_one_of("policy", name, POLICIES) for name in names]


def _shares(text: str) -> list[float]:
    found = [parse_share(part, "residency") for part in text.split(",")]
    for share in found:
        if share > 1:
            raise Refusal("E_SIZE", f"residency {share:.0%} is more than 100%", "write it like 50%")
    return found


def _one_of(what: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise Refusal("E_OPTION", f"unknown {what} {name!r}", nearest(name, known))
    return name


def _number(what: str, text: str | int, most: int, least: int = 1) -> int:
    number = int(text) if str(text).strip().isdigit() else 0
    if not least <= number <= most:
        raise Refusal("E_OPTION", f"{what} {str(text)!r} is not between {least} and {most}", "give a whole number")
    return number


def _cap(text: str | None) -> int | None:
    if text is None:
        return None
    n_bytes = parse_size(text, "cap")
    from duoserve.cap import memory_group

    with memory_group(n_bytes, "try"):  # refuse before anything is loaded
        return n_bytes


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)
