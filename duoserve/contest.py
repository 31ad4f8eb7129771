"""Who takes part in a benchmark, in which order, and what each answered. Knows processes, caps and turns; knows nothing of
models or figures. Imports no torch.

All contenders are loaded and take short turns, so that a slow minute of the machine slows all of them; where they do not fit
in memory together, each runs alone, one after the other.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

from duoserve.cap import Group, memory_group
from duoserve.config import size

COLD, WARM, STEADY = "cold", "warm", "steady"
PHASES = (COLD, WARM, STEADY)
SETTLING = 1  # requests between warm and steady that are not reported
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Contender:
    """`engine`: duoserve, stock or accelerate. `options` of `duoserve.load` without the model, or of `peers.open_peer`.

    `folder` holds the files that a cold start finds out of the page cache; `scratch` is where it may write.
    """

    row: str
    engine: str
    model: str | None
    folder: str
    options: dict[str, Any]
    routes: str = "real"  # or "uniform", which ours alone can
    cap: int | None = None
    scratch: str | None = None


class Request(NamedTuple):
    """A batch of prompts as tokens, padded on the left."""

    ids: list[list[int]]
    mask: list[list[int]]
    pad: int


@dataclass(frozen=True)
class Cell:
    """A prompt set at a batch size; `requests` are taken in order, from the first again once they are through."""

    prompts: str
    batch: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Course:
    """How often and how long. Each repetition loads anew."""

    repetitions: int
    steady: int  # requests of the steady phase in each repetition
    new_tokens: int
    patience_s: float = PATIENCE_S  # for one answer

    @property
    def requests(self) -> int:
        """That a cell needs for no request to be repeated."""
        return self.repetitions * (2 + SETTLING + self.steady + 1)


@dataclass
class Outcome:
    """What one contender answered in one cell: of each phase its samples, and why there are no more of them."""

    contender: Contender
    cell: Cell
    about: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    load_s: list[float] = field(default_factory=list)
    error: str | None = None


class Failed(Exception):
    """A contender did not answer; the message says why, in a line."""


class Process:
    """A contender in a process of its own, within its cap."""

    command: ClassVar[list[str]] = [sys.executable, "-m", "duoserve.contender"]

    def __init__(self, contender: Contender, number: int, stack: ExitStack, patience_s: float = PATIENCE_S):
        self.contender, self._patience_s = contender, patience_s
        self._said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        command = self.command
        self._group: Group | None = None
        if contender.cap is not None:
            self._group = stack.enter_context(memory_group(contender.cap, str(number)))
            command = ["sh", "-c", f'echo $$ > "{self._group.procs}" && exec "$@"', "sh", *command]
        env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=env
        )
        stack.callback(self.end)
        self._buffer = b""
        self._write(asdict(contender))

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Its answer; raises `Failed`."""
        self._write({"do": do} | what)
        line = self._line()
        try:
            found = json.loads(line)
        except ValueError as error:
            self._process.kill()
            raise Failed(_plain(f"answered no JSON: {line[:80].decode(errors='replace')!r}")) from error
        if "error" in found:
            raise Failed(_plain(found["error"]))
        return dict(found)

    def end(self) -> None:
        """Let it go; ends it where it does not go by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _write(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Failed(self._ended()) from error

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + self._patience_s
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                raise Failed(f"gave no answer in {self._patience_s:.0f} s and was ended")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise Failed(self._ended())
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> str:
        status = self._process.wait()
        if self._group is not None and self._group.kills():
            return f"killed: out of memory under a cap of {size(self.contender.cap or 0)}"
        if status < 0:
            return f"killed by signal {-status}{' (out of memory?)' if status == -9 else ''}"
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        return _plain(f"ended with status {status}: {lines[-1] if lines else 'nothing said'}")


def _plain(text: str, longest: int = 300) -> str:
    """On one line, printable and short."""
    text = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:longest]


Say = Callable[[str], None]


def compete(
    contenders: Sequence[Contender], cells: Sequence[Cell], course: Course, in_turns: bool, say: Say
) -> list[Outcome]:
    """Outcomes of every contender in every cell, in that order. A contender that fails has them with an error."""
    groups = [list(contenders)] if in_turns else [[one] for one in contenders]
    found = []
    for number, group in enumerate(groups):
        with ExitStack() as stack:
            started = [(one, _started(one, at, stack, course, say)) for at, one in enumerate(group, number)]
            found += _group([(one, _ready(process)) for one, process in started], cells, course, say)
    return found


def _started(contender: Contender, number: int, stack: ExitStack, course: Course, say: Say) -> Process | str:
    """The process, or why there is none."""
    say(f"starting {contender.row}")
    try:
        return Process(contender, number, stack, course.patience_s)
    except Failed as failed:
        return str(failed)


def _ready(process: Process | str) -> Process | str:
    """Once it has imported what it needs: while others do, nobody is measured."""
    if isinstance(process, str):
        return process
    try:
        process.ask("ready")
        return process
    except Failed as failed:
        return str(failed)


def _group(
    started: list[tuple[Contender, Process | str]], cells: Sequence[Cell], course: Course, say: Say
) -> list[Outcome]:
    table = {(i, j): Outcome(one, cell) for i, (one, _) in enumerate(started) for j, cell in enumerate(cells)}
    for (i, _), outcome in table.items():
        process = started[i][1]
        outcome.error = process if isinstance(process, str) else None
    for j, cell in enumerate(cells):
        for repetition in range(course.repetitions):
            say(f"{cell.prompts}, batch {cell.batch}: repetition {repetition + 1} of {course.repetitions}")
            for phase, request in _requests(cell, repetition, course):
                for i in _rotated(len(started), repetition):
                    process = started[i][1]
                    if isinstance(process, Process):
                        _turn(process, table[i, j], phase, request, course)
    return list(table.values())


def _rotated(n: int, by: int) -> list[int]:
    order = list(range(n))
    return order[by % n :] + order[: by % n]


def _requests(cell: Cell, repetition: int, course: Course) -> Iterator[tuple[str | None, Request]]:
    """The requests of one repetition with their phases; None is not reported."""
    phases = [COLD, WARM, *[None] * SETTLING, *[STEADY] * course.steady]
    for number, phase in enumerate(phases, repetition * (len(phases) + 1)):  # each phase meets other prompts
        yield phase, cell.requests[number % len(cell.requests)]


def _turn(process: Process, outcome: Outcome, phase: str | None, request: Request, course: Course) -> None:
    """One request to one contender; a process that is gone stays so, in all cells."""
    if outcome.error is not None:
        return
    try:
        if phase == COLD:
            about = process.ask("open")
            outcome.load_s.append(about.pop("load_s"))
            outcome.about = about
        sample = process.ask("run", **request._asdict(), new_tokens=course.new_tokens)
        if phase is not None:
            outcome.samples[phase].append(sample)
    except Failed as failed:
        outcome.error = str(failed)
