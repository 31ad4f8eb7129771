"""Prompts: files of them, and the sets that come with the program, each with its checksum. Knows files and what a prompt
looks like; knows nothing of tokens or models. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from duoserve.core import Refusal, nearest
from duoserve.headers import bounded_json, read_json, regular_size

SETS = Path(__file__).parent / "promptsets"
NAMES = ("prose", "code", "questions")
MAX_FILE, MAX_VALUES = 256 << 20, 100_000  # bytes of a file of prompts; JSON values of a line
KINDS = (".jsonl", ".txt", ".md")
_PROMPTS = "give .jsonl lines with prompt, text or messages, or .txt and .md files"


class Prompt(NamedTuple):
    """What is run: a text, or messages for the model's chat template."""

    id: str
    domain: str
    content: str | list[dict[str, str]]


class PromptSet(NamedTuple):
    """Prompts under a name, and the sha256 of the bytes that they were read from."""

    name: str
    sha256: str
    prompts: list[Prompt]


def prompt_set(name: str) -> PromptSet:
    """ "all", "prose", "code" or "questions", which come with the program and are checked; else a file or folder.

    "all" takes one of each set in turn.
    """
    if name == "all":
        parts = [prompt_set(part) for part in NAMES]
        in_turn = chain.from_iterable(zip_longest(*(part.prompts for part in parts)))
        return PromptSet(name, _sha256(p.sha256.encode() for p in parts), [p for p in in_turn if p is not None])
    if name in NAMES:
        return _shipped(name)
    path = Path(name)
    if not path.exists() and path.name == name and not path.suffix:
        what = f"no prompts {name!r} come with the program, and there is no such file"
        raise Refusal("E_PROMPTS", what, nearest(name, ("all", *NAMES)), 3)
    prompts = read_prompts(path)
    return PromptSet(name, _sha256(f"{p.id}\n{p.content}\n".encode() for p in prompts), prompts)


def _shipped(name: str) -> PromptSet:
    """One of the program's own sets; refuses one that is not as it was shipped."""
    path = SETS / f"{name}.jsonl"
    said = read_json(SETS / "manifest.json", _AGAIN)
    found = _sha256([path.read_bytes()]) if path.is_file() else "none"
    if not isinstance(said, dict) or said.get(path.name) != found:
        what = f"{path} has sha256 {found[:12]}, the manifest says otherwise"
        raise Refusal("E_PROMPTS", what, _AGAIN, 5)
    return PromptSet(name, found, read_prompts(path))


_AGAIN = "install the program again"


def _sha256(parts: Iterator[bytes] | Sequence[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, or of all files under a folder but its READMEs, in order of their names."""
    if not path.exists():
        raise Refusal("E_PROMPTS", f"there is no {path}", _PROMPTS, 3)
    files = [path]
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "README")))
        files = sorted(p for p in inside if p.suffix.lower() in KINDS)
    found = [prompt for file in files for prompt in _prompts_of(file)]
    if not found:
        raise Refusal("E_PROMPTS", f"{path} holds 0 prompts in {len(files)} files", _PROMPTS)
    return found


def _prompts_of(file: Path) -> Iterator[Prompt]:
    if file.suffix.lower() not in KINDS:
        raise Refusal("E_PROMPTS", f"{file} is none of {', '.join(KINDS)}", _PROMPTS)
    size = regular_size(file)
    if not 0 <= size <= MAX_FILE:
        what = "is no plain file" if size < 0 else f"has {size:,} bytes, at most {MAX_FILE:,} are read"
        raise Refusal("E_PROMPTS", f"{file} {what}", _PROMPTS)
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise Refusal("E_PROMPTS", f"{file} is not UTF-8 at byte {error.start}", _PROMPTS) from error
    if file.suffix.lower() != ".jsonl":
        if text.strip():
            yield Prompt(file.stem, file.resolve().parent.name, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _prompt(line, file, number)


def _prompt(line: str, file: Path, number: int) -> Prompt:
    where = f"{file}:{number}"
    try:
        data = bounded_json(line.encode(), where, _PROMPTS, MAX_VALUES)
    except Refusal as refusal:
        raise refusal.under("E_PROMPTS") from refusal
    data = data if isinstance(data, dict) else {}
    content = next((data[name] for name in ("prompt", "text", "messages") if name in data), None)
    chat = isinstance(content, list) and all(_is_message(m) for m in content)
    if not content or not (chat or isinstance(content, str)):
        raise Refusal("E_PROMPTS", f"{where} has 0 prompts", _PROMPTS)
    id, domain = data.get("id", f"{file.stem}-{number}"), data.get("domain", file.stem)
    return Prompt(str(id)[:200], str(domain)[:200], content)


def _is_message(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(data.get(name), str) for name in ("role", "content"))
