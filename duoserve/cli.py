"""The command line: puts the parts together and turns refusals into one line and an exit code. Imports torch late, so that
`--help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve import benching, console, dep, flags, learning, serving, settings, shelving, showing, simulating, tracing
from duoserve.config import EngineConfig, parse_size
from duoserve.core import Refusal, nearest
from duoserve.flags import check_targets, engine_options
from duoserve.progress import Interrupted, shown
from duoserve.pulse import pulsing
from duoserve.version import __version__

if TYPE_CHECKING:
    from duoserve.conversation import Conversation
    from duoserve.engine import Engine

INTERRUPTED = 130  # exit status

app = typer.Typer(
    name="duoserve",
    help="Run Mixture-of-Experts models whose experts do not fit in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass  # both are read by `main`, before anything is imported


@app.command()
@engine_options()
def chat(
    model: flags.Model = None,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once and leave.")] = None,
    system: flags.System = None,
    options: dict[str, Any],
    max_new_tokens: flags.MaxNewTokens = 256,
    temperature: flags.Temperature = None,
    top_p: flags.TopP = None,
    seed: flags.Seed = None,
    as_json: flags.FiguresAsJson = False,
    predictor: flags.PredictorName = None,
    timeline: flags.TimelineFile = None,
    url: Annotated[str | None, typer.Option(help="Talk to a server, such as http://127.0.0.1:8000, instead.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DUOSERVE_API_KEY", show_default=False, help="What that server asks for.")
    ] = None,
) -> None:
    """Chat with a model in the terminal, or answer one --prompt."""
    if timeline is not None and url is not None:
        raise Refusal("E_OPTION", "--timeline is the server's", "leave it out with --url")
    check_targets(timeline)
    if prompt is not None and not prompt.strip():
        raise Refusal("E_PROMPT", "the prompt has 0 words", "write at least one, or leave --prompt out for a chat")
    sampling = settings.sampling(max_new_tokens, temperature, top_p, seed)
    with _conversation(model, options, predictor, system, url, api_key) as (chat, greeting):
        from duoserve import repl

        with _recorded(chat.engine, timeline, predictor):
            if prompt is not None:
                repl.answer_once(chat, prompt, sampling, as_json)
            else:
                repl.run(chat, greeting, sampling, as_json)


@app.command()
@engine_options("budget", "format", "trunk", "dtype", "device", "ctx")
def plan(
    model: flags.Model = None,
    *,
    options: dict[str, Any],
    ram: Annotated[str | None, typer.Option(help="Plan as if this much memory were free, such as 24GiB.")] = None,
    as_json: flags.AsJson = False,
    cache_dir: flags.CacheDir = None,
    predictor: flags.PredictorName = None,
) -> None:
    """What fits and what it will cost, from the config alone; loads and downloads no weights."""
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
    as_json: flags.AsJson = False,
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
    if sys.stderr.isatty():
        print(f"loading {model or 'the demo'} ...", file=sys.stderr, flush=True)
    what = f"loading {model or 'the demo'}"
    with pulsing(what):  # torch takes its time
        from duoserve.opening import load
    with shown() as progress, pulsing(what, terminals=False) as pulse:
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


shelving.register(app)
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
    except Interrupted as why:
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
