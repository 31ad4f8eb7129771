"""The stores in the cache: which there are, and how one is removed. Knows folders, manifests and locks; knows nothing of
what is in a store. Imports no torch, so that it answers at once.

    whole      a manifest that can be read; what `duoserve verify` would say is not known
    partial    begun and not finished, or left by a killed removal
    being made some process holds the folder's lock
    damaged    a manifest that cannot be read, or another version's; made again when it is next asked for
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duoserve.core import Refusal, nearest
from duoserve.durable import LOCK, exclusive, holder, sync_folder
from duoserve.headers import read_json, shown
from duoserve.manifest import JOB, MANIFEST, MAX_MANIFEST, TRUNK, read_manifest

WHOLE, PARTIAL, MAKING, DAMAGED = "whole", "partial", "being made", "damaged"
_REMOVED = ".removed-"  # begins the name of a folder while it is taken away: no store is called so
_MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class Shelved:
    """One store of the cache. `pid`: of the process at work on it, 0 where that is not known; `used`: seconds since 1970."""

    name: str
    path: Path
    state: str
    format: str
    model_type: str
    n_bytes: int
    used: float
    pid: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def cache_dir(asked: str | None = None) -> Path:
    """Where converted stores are kept: `asked`, or $DUOSERVE_CACHE, or the user's cache folder."""
    import platformdirs

    folder = asked or os.environ.get("DUOSERVE_CACHE") or platformdirs.user_cache_dir("duoserve")
    return Path(folder).expanduser() / "stores"


def note_use(folder: Path) -> None:
    """Remember when a store was last used, by its folder's time; a folder that cannot be written keeps its own."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def refuse_half_made(folder: Path) -> None:
    """Say of a store that is not finished just that, not that it is no checkpoint."""
    if (folder / JOB).is_file() and not (folder / MANIFEST).exists():
        pid = holder(folder)
        what = f"{folder} holds 1 store that is not finished" + (
            f"; process {pid or '?'} makes it" if pid is not None else ""
        )
        raise Refusal("E_STORE", what, "run its `duoserve convert` again, which goes on where it stopped", 3)


def on_shelf(cache: Path) -> list[Shelved]:
    """The stores in a cache folder, last used first. Links, files and folders of something else are none."""
    found = map(_look, _folders(cache))
    return sorted((item for item in found if item), key=lambda item: -item.used)


def others(cache: Path) -> list[str]:
    """Names in a cache folder that are no stores: nothing here removes them."""
    known = {item.name for item in on_shelf(cache)}
    names = sorted(os.listdir(cache)) if cache.is_dir() else []
    return [name for name in names if name not in known]


def choose(items: list[Shelved], names: Iterable[str]) -> list[Shelved]:
    """Those meant by their names, or by beginnings that only one has; Refusal where none or several have it."""
    chosen = {}
    for name in names:
        exact = [item for item in items if item.name == name]
        found = exact or [item for item in items if name and item.name.startswith(name)]
        if len(found) > 1:
            meant = ", ".join(item.name for item in found[:4])
            raise Refusal("E_NAME", f"{shown(name)} could be {len(found)} stores: {meant}", "write more of the name")
        if not found:
            known = sorted({item.name.rsplit("-", 2)[0] for item in items})  # the model's part of the name
            hint = nearest(name, known) if known else "see `duoserve ls`"
            raise Refusal("E_NAME", f"none of {len(items)} stores in the cache is called {shown(name)}", hint, 3)
        chosen[found[0].name] = found[0]
    return list(chosen.values())


def refuse_in_use(items: Iterable[Shelved]) -> None:
    """A store that is being made is not removed under the hands of the process that makes it."""
    for item in items:
        if (pid := holder(item.path)) is not None:
            raise _in_use(item.name, pid)


def remove(item: Shelved) -> int:
    """Take a store away and return the bytes freed. Killed on the way it leaves nothing that opens as a store."""
    refuse_in_use([item])
    with exclusive(item.path, lambda _: _raise_in_use(item)):
        kept = [file.name for file in os.scandir(item.path) if file.is_dir(follow_symlinks=False)]
        if kept:
            raise Refusal(
                "E_NAME", f"{item.path} holds the folder {shown(kept[0])}, which no store has", "remove it by hand"
            )
        gone = item.path.with_name(f"{_REMOVED}{item.name.removeprefix(_REMOVED)}.{os.getpid()}")
        os.rename(item.path, gone)
        sync_folder(gone.parent)
        return _clear(gone)


def _clear(folder: Path) -> int:
    """Remove a folder of plain files, the manifest first, the lock last; returns their bytes. Links are not followed."""
    entries = {file.name: file.stat(follow_symlinks=False).st_size for file in os.scandir(folder)}
    for name in sorted(entries, key=lambda name: (name != MANIFEST, name == LOCK)):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    return sum(entries.values())


def _folders(cache: Path) -> list[Path]:
    if not cache.is_dir():
        return []
    return [cache / entry.name for entry in os.scandir(cache) if entry.is_dir(follow_symlinks=False)]


def _look(folder: Path) -> Shelved | None:
    """What is in a folder of the cache, None where it is no store; None also where it went away just now."""
    try:
        files = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder)}
        used = folder.stat().st_mtime
    except OSError:
        return None
    pid, about = holder(folder), _about(folder, files)
    if about is None and pid is None:
        return None
    state, format, model_type = about or (PARTIAL, "?", "?")
    return Shelved(
        name=folder.name,
        path=folder,
        state=MAKING if pid is not None else state,
        format=format,
        model_type=model_type,
        n_bytes=sum(files.values()),
        used=used,
        pid=pid,
    )


def _about(folder: Path, files: Iterable[str]) -> tuple[str, str, str] | None:
    """State, format and model type; None where nothing here is a store's."""
    if folder.name.startswith(_REMOVED):
        return PARTIAL, "?", "?"
    if MANIFEST in files:
        try:
            return WHOLE, str(read_manifest(folder)["format"]), _model_type(folder / "config.json")
        except (Refusal, OSError):
            return DAMAGED, "?", _model_type(folder / "config.json")
    if JOB in files:
        note = _json(folder / JOB, MAX_MANIFEST)
        job = note.get("job")
        return PARTIAL, _word(job if isinstance(job, dict) else note, "format"), _word(note, "model_type")
    ours = [n for n in files if n in (LOCK, TRUNK) or n.startswith("experts-") or n.endswith(".tmp")]
    return (PARTIAL, "?", "?") if len(ours) == len(list(files)) else None


def _model_type(config: Path) -> str:
    return _word(_json(config, _MAX_CONFIG), "model_type")


def _json(path: Path, max_bytes: int) -> dict[str, Any]:
    """An object in a file, empty where there is none: what it says is only shown."""
    try:
        data = read_json(path, "", max_bytes)
    except (Refusal, OSError):
        return {}
    return data if isinstance(data, dict) else {}


def _word(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    return value[:40] if isinstance(value, str) and value.isprintable() and value else "?"


def _raise_in_use(item: Shelved) -> None:
    raise _in_use(item.name, holder(item.path) or 0)


def _in_use(name: str, pid: int) -> Refusal:
    return Refusal("E_BUSY", f"{name} is being made by process {pid or '?'}", "wait for it, or stop that process")
