"""The commands `convert`, `verify`, `ls` and `rm`: expert stores made, read to the last byte, listed and removed. Knows the
command line and the cache; knows nothing of slabs. Imports torch late.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from duoserve import flags
from duoserve.columns import aligned
from duoserve.config import EngineConfig, size
from duoserve.core import Refusal
from duoserve.progress import shown

if TYPE_CHECKING:
    from duoserve.shelf import Shelved


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
    with shown() as progress:
        folder = make_store(resolve(model, progress, check_config), out, format, dtype, progress)
    total = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {format} expert store, {size(total)}")


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


def list_stores(
    as_json: flags.AsJson = False,
    cache_dir: flags.CacheDir = None,
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
    for line in _table(items):
        print(line)
    print(f"{_stores(items)}, {size(total)}, in {_printable(str(cache))}")
    for name in shelf.others(cache):
        print(f"{_printable(name)} is no store")


def _table(items: list[Shelved]) -> Iterator[str]:
    """Plain columns: they go through pipes as well."""
    rows = [["NAME", "MODEL", "FORMAT", "SIZE", "STATE", "LAST USED"]] if items else []
    for item in items:
        state = item.state if item.pid is None else f"{item.state} by {item.pid or '?'}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used))
        rows.append([_printable(item.name), item.model_type, item.format, size(item.n_bytes), state, used])
    return aligned(rows)


def _stores(items: list[Shelved]) -> str:
    return f"{len(items)} store{'s' * (len(items) != 1)}"


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def remove_stores(
    names: Annotated[list[str] | None, typer.Argument(help="Stores by name, or by the beginning of one.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Those whose making was interrupted.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every store in the cache.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cache_dir: flags.CacheDir = None,
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


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(convert)
    app.command()(verify)
    app.command("ls")(list_stores)
    app.command("rm")(remove_stores)
