"""Options that more than one command takes: the engine's, made of EngineConfig's fields, and those that stand beside them.
Knows typer and words; knows nothing of what a command does with them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from duoserve.config import EngineConfig, Flag
from duoserve.core import Refusal

Command = Callable[..., None]
ENGINE: dict[str, Flag] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(EngineConfig, include_extras=True).items()
    if get_origin(hint) is Annotated
}

Model = Annotated[
    str | None, typer.Argument(help="Hub id, checkpoint folder or expert store; the bundled demo if left out.")
]
PredictorName = Annotated[
    str | None,
    typer.Option(
        "--predictor", help="What guesses ahead: a folder that `train` wrote, gate, none. Default: the demo's own."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FiguresAsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures as the last line.")]
TimelineFile = Annotated[
    Path | None, typer.Option("--timeline", help="Record what happens when, for `duoserve timeline FILE`.")
]
CacheDir = Annotated[str | None, typer.Option(help=ENGINE["cache_dir"].help)]
System = Annotated[str | None, typer.Option(help="A system message to begin with.")]
MaxNewTokens = Annotated[int, typer.Option(help="At most this many tokens per answer.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy. Default: the model's own.")]
TopP = Annotated[float | None, typer.Option(help="Sample from this share of the probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def check_targets(*paths: Path | None) -> None:
    """Refuse, before anything is computed, files that cannot be written: their folder is not there, or they are one."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise Refusal("E_IO", f"{path.parent} is no folder", "give a file in one that is there")
        if path is not None and path.is_dir():
            raise Refusal("E_IO", f"{path} is a folder", "give a file's name")


def engine_options(*names: str, **meaning: str) -> Callable[[Command], Command]:
    """A command's parameter `options` becomes an option for each of these fields of EngineConfig, without names for all.

    The command gets them as a dict that EngineConfig did not refuse: what cannot be is said before torch is imported.
    `meaning`: a help text where a field means something else than for one engine.
    """
    assert {*names, *meaning} <= set(ENGINE), (names, meaning)
    return spread("options", [_of_engine(name, meaning) for name in ENGINE if not names or name in names], _checked)


def _of_engine(name: str, meaning: dict[str, str]) -> Parameter:
    flag, default = ENGINE[name], getattr(EngineConfig, name)
    written: Any = flag.written if default is not None else flag.written | None
    shown = typer.Option(f"--{name.replace('_', '-')}", help=meaning.get(name, flag.help))
    return parameter(name, Annotated[written, shown], default)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    EngineConfig.of(**plain)
    return plain


def parameter(name: str, kind: Any, default: Any = None) -> Parameter:
    """`name: kind = default`, by keyword."""
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def spread(
    name: str, flags: Sequence[Parameter], made: Callable[[dict[str, Any]], Any]
) -> Callable[[Command], Command]:
    """A command's parameter `name` becomes these options; the command gets what is `made` of them."""

    def around(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        shown = [one for mine in own for one in (flags if mine.name == name else [mine])]

        signature = Signature(shown)

        @functools.wraps(command)
        def run(*given: Any, **said: Any) -> None:
            bound = signature.bind(*given, **said)
            bound.apply_defaults()
            bound.arguments[name] = made({flag.name: bound.arguments.pop(flag.name) for flag in flags})
            command(**bound.arguments)

        run.__signature__ = signature  # type: ignore[attr-defined]  # this and the next are what typer reads
        run.__annotations__ = {one.name: one.annotation for one in shown}
        return run

    return around
