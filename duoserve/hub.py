"""From the name of a model to a folder with its files: a path, or a repository of the hub, fetched by huggingface_hub.

Knows revisions, the hub's cache and its checksums; knows nothing of models. A revision is resolved to a commit once, and
everything else refers to that commit. The cache names each file by what it holds (SHA-256 where it is large, git's SHA-1
where it is small), so content can be checked at any later time: small files whenever they are used, weights by who is
about to convert them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from duoserve.core import Refusal
from duoserve.device import in_background
from duoserve.folder import CONFIG, INDEX, SIDE_FILES, SINGLE, no_weights, shards, side_files

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w-][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AT_ONCE = 4  # files
_LOOK_S = 0.3
_GIVE = "give a checkpoint folder, an expert store or a hub id (org/name or org/name@revision)"
_MAIN = "main"
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


class Listed(NamedTuple):
    """A file of a repository: what the cache names it by, and its bytes."""

    name: str
    blob: str
    size: int


class Snapshot(NamedTuple):
    """One commit of a repository, and where the cache keeps it."""

    repo: str
    commit: str
    cache: Path  # of this repository

    @property
    def folder(self) -> Path:
        return self.cache / "snapshots" / self.commit

    def blob(self, file: Listed) -> Path:
        return self.cache / "blobs" / file.blob


def resolve(
    model: str | os.PathLike[str],
    progress: Progress | None = None,
    accept: Callable[[Path], Any] = lambda folder: None,
    weights: bool = True,
) -> Path:
    """The folder behind MODEL: a path, or `org/name`, `org/name@revision` on the hub or in its cache.

    `accept` sees the folder once config and tokenizer are there, and refuses it before gigabytes are fetched; without
    `weights` they are not fetched at all.
    """
    path, name = Path(model).expanduser(), os.fspath(model)
    if name and os.path.isdir(path):
        return _speakable(path)
    match = _ID.fullmatch(name)
    if not name:
        raise Refusal("E_MODEL", "the model has a name of 0 characters", f"{_GIVE}, or leave it out for the demo", 3)
    if os.path.exists(path) or not match or ".." in name:
        what = f"{name!r} is a file, not a folder" if os.path.exists(path) else f"no model folder {name!r} here"
        raise Refusal("E_MODEL", what, _GIVE, 3)
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # its failures still rise
    disable_progress_bars()
    return _folder(match[1], match[2] or _MAIN, progress, accept, weights)


def _speakable(path: Path) -> Path:
    """What reads tensors takes names in UTF-8 only."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        what = f"the name of {path} is not UTF-8 at character {error.start}"
        raise Refusal("E_MODEL", what, "rename the folder, or give a link to it", 3) from error
    return path


def source(folder: Path) -> dict[str, str] | None:
    """{"repo", "commit"} where `folder` is a snapshot in a hub cache."""
    at = folder.absolute()
    if at.parent.name != "snapshots" or not at.parent.parent.name.startswith("models--"):
        return None
    return {"repo": at.parent.parent.name.removeprefix("models--").replace("--", "/"), "commit": at.name}


def check(folder: Path, files: Iterable[Path], progress: Progress | None = None) -> None:
    """Compare files of a hub snapshot with the checksums that they are named by; wrong ones are taken away and named.

    Files that lie in no hub cache have no such names, and pass.
    """
    files, bad = list(files), []
    sizes = [file.stat().st_size for file in files]
    for i, file in enumerate(files):
        if progress:
            progress(sum(sizes[:i]), sum(sizes), f"checking {file.name}")
        if not _is_as_published(file):
            blob = file.parent / os.readlink(file)
            blob.resolve().unlink(missing_ok=True)  # newer hub caches share blobs by another link
            blob.unlink(missing_ok=True)
            file.unlink()
            bad.append(file.name)
    if bad:
        what = f"{len(bad)} of {len(files)} files in {folder} are not what the hub published: {', '.join(bad[:3])}"
        raise Refusal("E_CORRUPT", f"{what}; taken away", "run it again to fetch what is missing", 5)


def _is_as_published(file: Path) -> bool:
    if not file.is_symlink():
        return True
    name = os.path.basename(os.readlink(file))
    with open(file, "rb") as stream:
        if len(name) == 64:
            return hashlib.file_digest(stream, "sha256").hexdigest() == name
        if len(name) != 40:
            return True
        digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
        while piece := stream.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest() == name


def _folder(repo: str, revision: str, progress: Progress | None, accept: Callable[[Path], Any], weights: bool) -> Path:
    from huggingface_hub import HfApi, constants

    name = repo if revision == _MAIN else f"{repo}@{revision}"
    if constants.HF_HUB_OFFLINE:
        return _cached(repo, revision, name)
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        refusal = _refusal(error, name)
        if refusal.code != "E_HUB":
            raise refusal from error
        try:
            folder = _cached(repo, revision, name)
        except Refusal:
            raise refusal from error
        warnings.warn(f"{name}: {refusal}; going on with commit {folder.name[:12]} from the hub cache", stacklevel=4)
        return folder
    if not _COMMIT.fullmatch(str(info.sha)):
        raise Refusal("E_HUB", f"the hub gave no commit for {name}, but {str(info.sha)[:60]!r}", "check HF_ENDPOINT", 3)
    at = Snapshot(repo, str(info.sha), _repo_cache(repo))
    listed = _listed(info.siblings or [])
    _fetch_small(at, name, listed, progress)
    accept(at.folder)
    if weights:
        _fetch_weights(at, name, listed, progress)
        _remember(at, revision)
    return at.folder


def _fetch_small(at: Snapshot, name: str, files: dict[str, Listed], progress: Progress | None) -> None:
    """What says whether the rest is worth fetching, and what the rest is."""
    if CONFIG not in files or not {INDEX, SINGLE} & set(files):
        raise _no_checkpoint(name, files)
    small = [file for file in files.values() if SIDE_FILES.fullmatch(file.name) or file.name == INDEX]
    _download(at, name, small, progress)
    check(at.folder, [at.folder / file.name for file in small])


def _fetch_weights(at: Snapshot, name: str, files: dict[str, Listed], progress: Progress | None) -> None:
    weights = shards(at.folder / INDEX) if INDEX in files else [SINGLE]
    missing = [shard for shard in weights if shard not in files]
    if missing:
        what = f"{name} lacks {len(missing)} of {len(weights)} shards that its index names, {missing[0]} first"
        raise Refusal("E_CORRUPT", what, "use another revision, or tell its publisher", 5)
    _download(at, name, [files[shard] for shard in weights], progress)


def _download(at: Snapshot, name: str, files: list[Listed], progress: Progress | None) -> None:
    """Fetch what is not there yet; whole files are kept whatever happens."""
    files = [file for file in files if not (at.folder / file.name).is_file()]
    if not files:
        return
    absent = {file.blob: file for file in files if not at.blob(file).is_file()}
    _check_space(at, name, sum(file.size for file in absent.values()))
    todo: SimpleQueue[Listed] = SimpleQueue()
    for file in files:
        todo.put(file)
    finished = threading.Semaphore(0)
    failures: list[BaseException] = []

    def work() -> None:
        from huggingface_hub import hf_hub_download

        try:
            while not failures:
                hf_hub_download(at.repo, todo.get_nowait().name, revision=at.commit)
        except Empty:
            pass
        except BaseException as error:  # handed to who waits
            failures.append(error)
        finally:
            finished.release()

    workers = min(_AT_ONCE, len(files))
    for _ in range(workers):
        in_background(work, "fetch")  # not a pool, which would keep an interrupted process until its files are there
    total = sum(file.size for file in files)
    while workers and not failures:
        workers -= finished.acquire(timeout=_LOOK_S)
        if progress:
            progress(min(total, sum(_have(at, file) for file in files)), total, f"fetching {name}")
    if failures:
        raise _refusal(failures[0], name) from failures[0]


def _have(at: Snapshot, file: Listed) -> int:
    """Bytes of a file that arrived, under its own name or that of an unfinished one."""
    found = (at.cache / "blobs").glob(f"{file.blob}*")
    sizes = []
    for path in found:
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # finished just now
            sizes.append(file.size)
    return min(file.size, max(sizes, default=0))


def _check_space(at: Snapshot, name: str, need: int) -> None:
    there = next(path for path in (at.cache, *at.cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise Refusal(
            "E_DISK",
            f"{name} needs {need:,} bytes more, {free:,} are free in {there}",
            "free some, or set HF_HOME to a folder on another disk",
            6,
        )


def _listed(siblings: Iterable[Any]) -> dict[str, Listed]:
    """The repository's own files; folders hold the same weights once more, in other layouts."""
    found = {}
    for file in siblings:
        if "/" not in file.rfilename:
            blob, size = (file.lfs.sha256, file.lfs.size) if file.lfs else (file.blob_id, file.size)
            found[file.rfilename] = Listed(file.rfilename, str(blob), int(size or 0))
    return found


def _no_checkpoint(name: str, files: dict[str, Listed]) -> Refusal:
    if CONFIG not in files:
        return Refusal(
            "E_MODEL", f"{name} has no {CONFIG} among {len(files)} files", "use a transformers checkpoint", 3
        )
    return no_weights(name, files)


def _repo_cache(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _remember(at: Snapshot, revision: str) -> None:
    """Which commit a branch or tag stood for, as huggingface_hub keeps it; without network this is what finds it again."""
    if revision == at.commit:
        return
    path = at.cache / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(at.commit)
    os.replace(temporary, path)


def _cached(repo: str, revision: str, name: str) -> Path:
    """The whole snapshot in the cache; refuses where there is none, or only a part of one."""
    cache = _repo_cache(repo)
    ref = cache / "refs" / revision
    commit = revision if _COMMIT.fullmatch(revision) else ref.read_text().strip() if ref.is_file() else None
    folder = cache / "snapshots" / (commit or "none")
    if not (folder / CONFIG).is_file():
        raise _offline(f"{name} is no folder here and not in the hub cache {cache.parent}")
    check(folder, side_files(folder))
    weights = shards(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    missing = [file for file in weights if not (folder / file).is_file()]
    if missing:
        what = f"{len(missing)} of {len(weights)} weight files of {name} are not in the hub cache, {missing[0]} first"
        raise _offline(what)
    return folder


def _offline(what: str) -> Refusal:
    return Refusal("E_OFFLINE", f"{what}, and offline mode is on (HF_HUB_OFFLINE)", "unset it to fetch them", 3)


def _refusal(error: BaseException, name: str) -> Refusal:
    """The hub's many ways to say no, each in one line."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return Refusal(
            "E_DISK", f"the disk filled up while {name} was fetched ({reason})", "free some and run it again", 6
        )
    if isinstance(error, errors.GatedRepoError):
        return Refusal(
            "E_GATED", f"{name} is gated", "ask for access on its page, then `hf auth login` or set HF_TOKEN", 3
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Refusal("E_REVISION", f"the hub has {name.split('@')[0]}, but no such revision ({name})", _REVISION, 3)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        what = f"{name!r} is no folder here, and the hub shows no such model ({status})"
        return Refusal("E_MODEL", what, "check the name; for a private one, `hf auth login` or set HF_TOKEN", 3)
    if isinstance(error, errors.HFValidationError):
        return Refusal("E_MODEL", f"{name!r} is no folder here and no hub id ({reason})", "check the name", 3)
    if status:
        return Refusal("E_HUB", f"the hub answered {status} for {name}", "try again later; whole files are kept", 3)
    cause = error.__cause__ or error.__context__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    if cause is not None:
        return _refusal(cause, name)
    what = f"{name} could not be fetched ({type(error).__name__}: {reason})"
    return Refusal("E_HUB", what, "check the name and the network and run it again; whole files are kept", 3)


_REVISION = "give a branch, a tag or a commit after @"
