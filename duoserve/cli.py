"""The command line: puts the parts together and turns refusals into one line and an exit code. Imports torch late, so that
`--help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve import benching, console, dep, learning, serving, settings, showing, simulating, tracing
from duoserve.config import EngineConfig, parse_size, size
from duoserve.core import Refusal, nearest
from duoserve.pulse import pulsing
from duoserve.version import __version__

if TYPE_CHECKING:
    from duoserve.conversation import Conversation
    from duoserve.convert import Progress
    from duoserve.engine import Engine
    from duoserve.shelf import Shelved

INTERRUPTED = 130  # exit status

app = typer.Typer(
    name="duoserve",
    help="Run Mixture-of-Experts models whose experts do not fit in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None, typer.Argument(help="Hub id, checkpoint folder or expert store; the bundled demo if left out.")
]
Budget = Annotated[
    str | None,
    typer.Option(help="Memory for trunk, slots and KV: 6GiB, 15% of the bf16 model, half of its experts, min."),
]
Format = Annotated[str | None, typer.Option(help="Experts as int4 (default), nf4 or bf16.")]
Trunk = Annotated[
    str | None, typer.Option(help="Attention, shared experts and head as int4 (default on the CPU), nf4 or bf16.")
]
Dtype = Annotated[str | None, typer.Option(help="Arithmetic and trunk: bfloat16, float32 or float16.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Ctx = Annotated[str | None, typer.Option(help="Tokens of context to plan for, such as 4096 or 32k.")]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy", help="duoserve; or, on the same slots, to compare with: lru, on-demand, lfp, mif, duoserve-paper."
    ),
]
PredictorName = Annotated[
    str | None,
    typer.Option(
        "--predictor", help="What guesses ahead: a folder that `train` wrote, gate, none. Default: the demo's own."
    ),
]
Link = Annotated[
    str | None, typer.Option(help="Slow copies to so many bytes per second, such as 500MB: for experiments, CPU only.")
]
Slots = Annotated[str | None, typer.Option(help="At most so many slots, or top-k: what one layer's token chooses.")]
Threads = Annotated[int | None, typer.Option(help="Threads of arithmetic. Default: the real cores that may be used.")]
Kernels = Annotated[
    Path | None,
    typer.Option("--kernels", help="What `dep kernels` measured here: unquantised experts by grouped products."),
]
CacheDir = Annotated[str | None, typer.Option(help="Where converted stores are kept.")]


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass  # both are read by `main`, before anything is imported


@app.command()
def chat(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    budget: Budget = None,
    format: Format = None,
    trunk: Trunk = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    ctx: Ctx = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens per answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy. Default: the model's own.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this share of the probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the figures as the last line.")
    ] = False,
    cache_dir: CacheDir = None,
    threads: Threads = None,
    policy: PolicyName = "duoserve",
    predictor: PredictorName = None,
    link: Link = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", help="Record what happens when, for `duoserve timeline FILE`.")
    ] = None,
    slots: Slots = None,
    kernels: Kernels = None,
    url: Annotated[str | None, typer.Option(help="Talk to a server, such as http://127.0.0.1:8000, instead.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DUOSERVE_API_KEY", show_default=False, help="What that server asks for.")
    ] = None,
) -> None:
    """Chat with a model in the terminal, or answer one --prompt."""
    where = {"budget": budget, "format": format, "trunk": trunk, "dtype": dtype, "device": device, "ctx": ctx}
    more = {"cache_dir": cache_dir, "threads": threads, "policy": policy, "link": link, "slots": slots}
    more["kernels"] = str(kernels) if kernels is not None else None
    if timeline is not None and url is not None:
        raise Refusal("E_OPTION", "--timeline is the server's", "leave it out with --url")
    if timeline is not None and not timeline.parent.is_dir():  # said before a model is loaded
        raise Refusal("E_IO", f"{timeline.parent} is no folder", "give a file in one that is there")
    if timeline is not None and timeline.is_dir():
        raise Refusal("E_IO", f"{timeline} is a folder", "give a file's name")
    if prompt is not None and not prompt.strip():
        raise Refusal("E_PROMPT", "the prompt has 0 words", "write at least one, or leave --prompt out for a chat")
    sampling = settings.sampling(max_new_tokens, temperature, top_p, seed)
    with _conversation(model, where | more, predictor, system, url, api_key) as (chat, greeting):
        from duoserve import repl

        with _recorded(chat.engine, timeline, predictor):
            if prompt is not None:
                repl.answer_once(chat, prompt, sampling, as_json)
            else:
                repl.run(chat, greeting, sampling, as_json)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the expert store.")],
    format: Annotated[str, typer.Option(help="Experts as int4, nf4 or bf16.")] = "int4",
    dtype: Annotated[
        str | None, typer.Option(help="float32 keeps a float32 checkpoint's unquantised weights exact.")
    ] = None,
) -> None:
    """Convert a checkpoint into an expert store; goes on where an interrupted conversion stopped."""
    EngineConfig(format=format, dtype=dtype)  # refuse before torch is imported
    from duoserve.checkpoint import check_config, quiet
    from duoserve.convert import convert as make_store
    from duoserve.hub import resolve

    quiet()
    with _progress() as progress:
        folder = make_store(resolve(model, progress, check_config), out, format, dtype, progress)
    total = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {format} expert store, {size(total)}")


@app.command()
def plan(
    model: Model = None,
    budget: Budget = None,
    format: Format = None,
    trunk: Trunk = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    ctx: Ctx = None,
    ram: Annotated[str | None, typer.Option(help="Plan as if this much memory were free, such as 24GiB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    cache_dir: CacheDir = None,
    predictor: PredictorName = None,
) -> None:
    """What fits and what it will cost, from the config alone; loads and downloads no weights."""
    options: dict[str, Any] = {"budget": budget, "format": format, "trunk": trunk, "dtype": dtype}
    options |= {"device": device, "ctx": ctx}
    EngineConfig.of(**options)  # refuse before torch is imported, as below
    if ram is not None:
        parse_size(ram, "ram")
    from duoserve import doctor as examiner
    from duoserve import opening, outlook

    options["predictor_bytes"] = opening.predictor_bytes(model, predictor)
    outlook.look(model, ram=ram, **options)  # refuse before anything is measured
    profile, why = examiner.known_profile(cache_dir)
    if profile is None:
        print(f"measuring this machine for a few seconds: {why}", file=sys.stderr, flush=True)
        profile = examiner.quick_profile(cache_dir)
    found = outlook.look(model, profile, ram, **options)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _print_rows(outlook.table(found))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    cache_dir: Annotated[str | None, typer.Option(help="Where stores are kept: the disk to be measured.")] = None,
) -> None:
    """This machine: versions, processor, memory, GPU, disk and link, what they do in a second, and what will hurt."""
    from duoserve import doctor as examiner

    def say(what: str) -> None:
        print(f"measuring {what} ...", file=sys.stderr, flush=True)

    report = examiner.examine(cache_dir, say if sys.stderr.isatty() else lambda what: None)
    if as_json:
        print(json.dumps(report))
    else:
        _print_rows(examiner.table(report))


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:{width}s}{value}")


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="Folder of an expert store.")]) -> None:
    """Read every byte of an expert store and name whatever is not as it was written."""
    from duoserve.manifest import is_store
    from duoserve.store import Store

    if not is_store(store):
        raise Refusal("E_STORE", f"{store} has no manifest", "give the folder of an expert store", 3)
    opened = Store(store)
    problems = list(opened.verify())
    for problem in problems:
        print(problem)
    if problems:
        n = len(problems)
        raise Refusal(
            "E_CORRUPT", f"{n} of the store's parts are not as written, named above", "convert the model again", 5
        )
    print(f"{store}: {opened.n_experts} experts and {len(opened.files)} files as written")


@app.command("ls")
def list_stores(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """List the converted stores in the cache, the last used first."""
    from duoserve import shelf

    cache = shelf.cache_dir(cache_dir)
    items = shelf.on_shelf(cache)
    total = sum(item.n_bytes for item in items)
    if as_json:
        about = {"cache": str(cache), "total_bytes": total, "others": shelf.others(cache)}
        print(json.dumps(about | {"stores": [item.to_json() for item in items]}))
        return
    _print_shelf(items)
    print(f"{_stores(items)}, {size(total)}, in {_printable(str(cache))}")
    for name in shelf.others(cache):
        print(f"{_printable(name)} is no store")


def _print_shelf(items: list[Shelved]) -> None:
    """Plain columns: they go through pipes as well."""
    rows = [("NAME", "MODEL", "FORMAT", "SIZE", "STATE", "LAST USED")] if items else []
    for item in items:
        state = item.state if item.pid is None else f"{item.state} by {item.pid or '?'}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used))
        rows.append((_printable(item.name), item.model_type, item.format, size(item.n_bytes), state, used))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _stores(items: list[Shelved]) -> str:
    return f"{len(items)} store{'s' * (len(items) != 1)}"


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


@app.command("rm")
def remove_stores(
    names: Annotated[list[str] | None, typer.Argument(help="Stores by name, or by the beginning of one.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Those whose making was interrupted.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every store in the cache.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Remove converted stores from the cache; checkpoints and stores elsewhere are not touched."""
    from duoserve import shelf

    if bool(names) + partial + everything != 1:
        raise Refusal("E_USAGE", "say NAME..., --partial or --all, one of the three", "see `duoserve ls` for the names")
    cache = shelf.cache_dir(cache_dir)
    items = shelf.on_shelf(cache)
    if partial:
        chosen = [item for item in items if item.state == shelf.PARTIAL]
    else:
        chosen = items if everything else shelf.choose(items, names or ())
    shelf.refuse_in_use(chosen)
    if chosen and not yes:
        _confirm(chosen)
    freed = 0
    for item in chosen:
        freed += shelf.remove(item)
        print(f"removed {_printable(item.name)}")
    print(f"{_stores(chosen)} removed, {size(freed)} freed")


def _confirm(chosen: list[Shelved]) -> None:
    total = size(sum(item.n_bytes for item in chosen))
    if not sys.stdin.isatty():
        raise Refusal("E_CONFIRM", f"{_stores(chosen)} ({total}) would be removed, 0 confirmed", "add --yes")
    for item in chosen:
        print(f"  {_printable(item.name)}  {size(item.n_bytes)}")
    if input(f"Remove {_stores(chosen)}, {total}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise typer.Abort


@contextmanager
def _conversation(
    model: str | None,
    options: dict[str, Any],
    predictor: str | None,
    system: str | None,
    url: str | None,
    api_key: str | None,
) -> Iterator[tuple[Conversation, str]]:
    """With an engine, or with a server; and how it is greeted."""
    if url is not None:
        theirs = EngineConfig().__dict__ | {"predictor": None}
        for name, value in (options | {"predictor": predictor}).items():
            if value != theirs[name]:
                raise Refusal("E_OPTION", f"--{name.replace('_', '-')} is the server's", "leave it out with --url")
        from duoserve.remote import RemoteConversation, Server

        server = Server(url, model, api_key)
        yield RemoteConversation(server, system), f"{server.model} at {server.url}. /help for commands."
        return
    with _engine(model, options, predictor) as engine:
        from duoserve.conversation import Conversation
        from duoserve.repl import banner

        yield Conversation(engine, system), banner(engine)


@contextmanager
def _engine(model: str | None, options: dict[str, Any], predictor: str | None = None) -> Iterator[Engine]:
    EngineConfig.of(**options)  # refuse before torch is imported
    if sys.stderr.isatty():
        print(f"loading {model or 'the demo'} ...", file=sys.stderr, flush=True)
    what = f"loading {model or 'the demo'}"
    with pulsing(what):  # torch takes its time
        from duoserve.opening import load
    with _progress() as progress, pulsing(what, terminals=False) as pulse:
        engine = load(model, progress=pulse.beside(progress), predictor=predictor, **options)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _recorded(engine: Engine, path: Path | None, predictor: str | None) -> Iterator[None]:
    """Record into a file what happens meanwhile; nothing where there is none."""
    if path is None:
        yield
        return
    from duoserve import doctor
    from duoserve.runfile import Run, write_run
    from duoserve.timeline import Timeline

    timeline = Timeline()
    engine.record(timeline)
    try:
        yield
    finally:
        engine.record(None)
        meta = engine.about() | {"predictor": predictor or "default"}
        write_run(path, Run.of(timeline, meta, doctor.identity()))
        print(f"recorded {path}: `duoserve timeline {path} --png picture.png` shows it", file=sys.stderr)


class _Interrupted(Exception):
    """Ctrl-C where it matters to know what of the work is lost."""


@contextmanager
def _progress() -> Iterator[Progress]:
    """Progress of fetching and converting, both of which go on where they were interrupted."""
    try:
        with _shown_progress() as progress:
            yield progress
    except KeyboardInterrupt as interrupt:
        raise _Interrupted("the same command goes on where it stopped") from interrupt


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """Progress on stderr: a bar with ETA in a terminal, else a line every 5 s."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
        return
    began = said = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal said
        now = time.monotonic()
        if not total:  # nothing to count: waiting for another process, which nobody else will say
            print(what, file=sys.stderr, flush=True)
        elif now - said >= 5:
            said = now
            left = f", {(now - began) * (total - done) / done:.0f} s left" if done else ""
            print(f"{what}: {done >> 20} of {total >> 20} MiB{left}", file=sys.stderr, flush=True)

    yield line


tracing.register(app)
learning.register(app)
serving.register(app)
showing.register(app)
benching.register(app)
simulating.register(app)
dep.register(app)


def main() -> None:
    """Entry point. Exit codes as `Refusal.status`; 1 is unexpected, 130 interrupted."""
    console.prepare()
    if "--version" in sys.argv[1:2]:
        print(f"duoserve {__version__}")
        return
    if "--debug" in sys.argv[1:2]:
        app(standalone_mode=False)
        return
    sys.exit(_guarded())


def _guarded() -> int:
    try:
        status = int(app(standalone_mode=False) or 0)
        return status if status != INTERRUPTED else _say("interrupted", INTERRUPTED)  # typer makes a status of Ctrl-C
    except Refusal as refusal:
        return _say(str(refusal), refusal.status)
    except typer.Exit as done:
        return int(done.exit_code)
    except _Interrupted as why:
        return _say(f"interrupted; {why}", INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS):
            return _say(f"E_IO: {error}; give a folder that can be written", 2)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _say(
            f"{'E_DISK' if full else 'E_IO'}: {error}; {'free some space' if full else 'check the disk'} and run it again",
            6 if full else 1,
        )
    except Exception as error:
        if isinstance(error, _usage_error()):
            if not error.format_message():  # type: ignore[attr-defined]  # bare `duoserve`: the help was the answer
                return 2
            return _say(f"E_USAGE: {_usage(error)}", 2)
        what = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        return _say(
            f"E_INTERNAL: {type(error).__name__}: {what}; run `duoserve --debug ...` and report the traceback", 1
        )


def _usage_error() -> type[Exception]:
    return typer.BadParameter.__mro__[1]  # typer carries its own copy of click, or imports it, by version


def _usage(error: Exception) -> str:
    text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    if text.startswith("No such command") and "Did you mean" not in text:
        word = text.split("'")[1] if "'" in text else ""
        names = sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback)
        text = f"{text} {nearest(word, names)}"
    return f"{text} Try 'duoserve --help'."


def _say(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
