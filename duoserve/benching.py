"""The command `bench`: policies, residencies, prompt sets and batches side by side, with peers and with the physical limit.
Knows options and tables; has contenders run by `contest` and figures made by `tally`. Imports torch late.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve import results
from duoserve.board import compared, table
from duoserve.config import POLICIES, EngineConfig, parse_share, parse_size, size
from duoserve.contest import PHASES, Cell, Contender, Course, Request, compete
from duoserve.core import Refusal, nearest
from duoserve.peers import chosen
from duoserve.prompts import Prompt, PromptSet, prompt_set

if TYPE_CHECKING:
    from duoserve.engine import Engine
    from duoserve.plan import Plan
    from duoserve.profile import Profile

INTERPRETER = 500 << 20  # bytes that Python, torch and transformers take before any weight, about
ROUTES = ("real", "uniform")
STEADY = 3  # requests of a repetition
MAX_BATCH, MAX_NEW, LONGEST = 1024, 1 << 20, 1 << 30
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
) -> None:
    """Compare policies, residencies and peers on real prompts: latency, speed, bytes, stalls, beside the physical limit."""
    options: dict[str, Any] = {"format": format, "trunk": trunk, "dtype": dtype, "device": device, "link": link}
    options |= {"cache_dir": cache_dir, "threads": threads}
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
    found = measure(model, matrix, options, _say)
    if output is not None:
        results.write(output, found)
    for text in (results.line(r) for r in found) if as_json else table(found):
        print(text)
    if before is not None:
        for text in compared(found, before):
            print(text, file=sys.stderr if as_json else sys.stdout)


@dataclass(frozen=True)
class Matrix:
    """What is run: every policy at every residency, and the peers, on every prompt set at every batch size."""

    policies: list[str]
    residencies: list[float]
    sets: list[PromptSet]
    batches: list[int]
    peers: list[str]
    cap: int | None
    routes: str
    course: Course
    limit_tokens: int | None = None
    predictor: str | None = None


def measure(
    model: str | None, matrix: Matrix, options: dict[str, Any], say: Callable[[str], None]
) -> list[results.Record]:
    """Rows of results, contender by contender. `options`: format, trunk, dtype, device, link, cache_dir, threads."""
    say("opening the model")
    subject = study(model, matrix, options)
    profile = _profile(options.get("cache_dir"), say)
    contenders = [*_ours(subject, matrix, options), *_peers(subject, matrix, options)]
    return run(subject, contenders, matrix, profile, options, say)


def run(
    subject: Subject,
    contenders: Sequence[Contender],
    matrix: Matrix,
    profile: Profile | None,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> list[results.Record]:
    """Let these contenders run the matrix's prompt sets and batches; its policies and peers are not looked at."""
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
    outcomes = compete(contenders, subject.cells, matrix.course, in_turns, say)
    return [record(outcome, phase, setting) for outcome in outcomes for phase in PHASES]


@dataclass(frozen=True)
class Subject:
    """The model as it is to be measured: prompts as tokens, the smallest plan that holds them, what a token needs."""

    name: str
    model: str | None
    folder: Path  # of the store
    checkpoint: Path
    device: str
    dtype: str
    cells: list[Cell]
    ctx: int
    sequences: int
    smallest: Plan  # without a predictor
    predictor_bytes: int
    checkpoint_bytes: int
    needs: Any
    peer_needs: Any

    def budget(self, share: float, asks: bool) -> int:
        """Bytes that give `share` of the experts a slot, by the plan's own arithmetic; `asks` a predictor, or none."""
        plan = self.smallest
        slots = max(plan.slots, round(share * plan.experts))
        extra = self.predictor_bytes if asks else 0
        return plan.planned_bytes + extra + (slots - plan.slots) * plan.slot_bytes

    def half_precision(self, share: float) -> int:
        """Bytes of a peer's weights with `share` of them in memory."""
        return max(1, round(share * self.checkpoint_bytes))


def study(model: str | None, matrix: Matrix, options: dict[str, Any]) -> Subject:
    """Open the model once, as small as it goes: that converts it if need be, and its tokenizer reads the prompts."""
    from duoserve import opening, outlook
    from duoserve.engine import DEMO
    from duoserve.hub import resolve
    from duoserve.manifest import is_store

    checkpoint = DEMO if model is None else resolve(model)
    if matrix.peers and is_store(checkpoint):
        what = f"{len(matrix.peers)} peers cannot load {checkpoint}, an expert store"
        raise Refusal("E_OPTION", what, "give the checkpoint, or --peers none")
    known = {name: value for name, value in options.items() if value is not None and name != "link"}
    with opening.load(model, budget="min", ctx=8, predictor="none", **known) as engine:
        cells, ctx = _cells(engine, matrix)
        folder, device = engine.store.folder, engine.device.name
        dtype, bf16_bytes = str(engine.dtype).removeprefix("torch."), engine.store.size.bf16_bytes
    sequences = max(matrix.batches)
    extra: dict[str, Any] = {"budget": "min", "ctx": ctx, "sequences": sequences}
    plain = {name: value for name, value in known.items() if name != "threads"}
    looked = outlook.look(model, **plain, **extra)
    peers = outlook.look(model, **(plain | {"format": "bf16", "trunk": "bf16"}), **extra) if matrix.peers else None
    return Subject(
        name=model or "demo",
        model=model,
        folder=folder,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        cells=cells,
        ctx=ctx,
        sequences=sequences,
        smallest=looked.plan,
        predictor_bytes=opening.predictor_bytes(model, matrix.predictor),
        checkpoint_bytes=bf16_bytes * (2 if dtype == "float32" else 1),
        needs=looked.needs,
        peer_needs=peers.needs if peers else None,
    )


def _cells(engine: Engine, matrix: Matrix) -> tuple[list[Cell], int]:
    """Every prompt set at every batch size as tokens, and the context that holds all of it."""
    from duoserve.sizing import model_limit

    new = matrix.course.new_tokens
    most = min((model_limit(engine.model.config) or LONGEST) - new, matrix.limit_tokens or LONGEST)
    if most < 1:
        raise Refusal("E_CTX", f"{new} new tokens leave no room for a prompt", "lower --new-tokens", 4)
    cells, ctx = [], 0
    for prompts in matrix.sets:
        rows = [_tokens(engine, prompt, most) for prompt in prompts.prompts]
        for batch in matrix.batches:
            requests = tuple(_request(engine, rows, n * batch, batch) for n in range(matrix.course.requests))
            ctx = max([ctx, *(len(r.ids[0]) + new for r in requests)])
            cells.append(Cell(prompts.name, batch, requests))
    return cells, ctx


def _tokens(engine: Engine, prompt: Prompt, most: int) -> list[int]:
    """Of a model without a tokenizer, bytes stand for tokens."""
    if engine.tokenizer is None:
        text = prompt.content if isinstance(prompt.content, str) else "\n\n".join(m["content"] for m in prompt.content)
        least = min(3, engine.model.config.get_text_config().vocab_size - 1)  # small ids are often special
        kinds = engine.model.config.get_text_config().vocab_size - least
        return [least + byte % kinds for byte in text.encode()[:most]]
    content = prompt.content
    if not isinstance(content, str) and not engine.tokenizer.chat_template:
        content = "\n\n".join(message["content"] for message in content)
    return engine.encode(content)[0][:most].tolist()


def _request(engine: Engine, rows: list[list[int]], first: int, batch: int) -> Request:
    config = engine.model.generation_config
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else end or 0
    taken = [rows[(first + i) % len(rows)] for i in range(batch)]
    longest = max(map(len, taken))
    ids = [[pad] * (longest - len(row)) + row for row in taken]
    return Request(ids, [[0] * (longest - len(row)) + [1] * len(row) for row in taken], pad)


def _ours(subject: Subject, matrix: Matrix, options: dict[str, Any]) -> Iterator[Contender]:
    for share in matrix.residencies:
        for policy in matrix.policies:
            yield ours(f"{policy} {share:.0%}", subject, share, policy, matrix, options)


def ours(row: str, subject: Subject, share: float, policy: str, matrix: Matrix, options: dict[str, Any]) -> Contender:
    """Our engine with `share` of the experts in slots."""
    from duoserve.opening import ASKING

    known = {name: value for name, value in options.items() if value is not None}
    known |= {"budget": subject.budget(share, policy in ASKING), "ctx": subject.ctx, "sequences": subject.sequences}
    known["policy"] = policy
    if policy in ASKING and matrix.predictor is not None:
        known["predictor"] = matrix.predictor
    return Contender(row, "duoserve", subject.model, str(subject.folder), known, matrix.routes, matrix.cap)


def _peers(subject: Subject, matrix: Matrix, options: dict[str, Any]) -> Iterator[Contender]:
    """Stock takes what it takes; Accelerate what the cap leaves, or the share of its weights that ours has of experts."""
    for name in matrix.peers:
        if name == "stock":
            yield peer("stock", name, subject, None, matrix.cap, options)
        elif matrix.cap is not None:
            yield peer(name, name, subject, max(1, matrix.cap - INTERPRETER), matrix.cap, options)
        else:
            for share in matrix.residencies:
                yield peer(f"{name} {share:.0%}", name, subject, subject.half_precision(share), None, options)


def peer(
    row: str, name: str, subject: Subject, memory: int | None, cap: int | None, options: dict[str, Any]
) -> Contender:
    """A peer with at most `memory` bytes of weights, as far as it can be told so."""
    from duoserve.shelf import cache_dir

    known = {"dtype": subject.dtype, "device": subject.device, "threads": options.get("threads"), "memory": memory}
    scratch = cache_dir(options.get("cache_dir")).parent
    folder = str(subject.checkpoint)
    return Contender(row, name, folder, folder, known, cap=cap, scratch=str(scratch))


def _fit_together(contenders: Sequence[Contender], subject: Subject, say: Callable[[str], None]) -> bool:
    from duoserve.system import available_ram

    needed, free = sum(_takes(one, subject) for one in contenders), available_ram()
    if needed > free:
        say(f"{len(contenders)} rows take {size(needed)}, {size(free)} are free: each runs alone, one after the other")
    return needed <= free


def _takes(contender: Contender, subject: Subject) -> int:
    """Bytes of memory, about."""
    if contender.cap is not None:
        return contender.cap
    if contender.engine == "duoserve":
        return INTERPRETER + int(contender.options["budget"])
    return INTERPRETER + int(2.2 * subject.checkpoint_bytes)  # while transformers loads, most of it is there twice


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
    found = [parse_share(part) for part in text.split(",")]
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
