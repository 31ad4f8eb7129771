"""Who takes part in a benchmark, in which order, and what each answered. Knows processes, caps and turns; knows nothing of
models or figures. Imports no torch.

All contenders are loaded and take short turns, so that a slow minute of the machine slows all of them; where they do not fit
in memory together, each runs alone, one after the other.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

from duoserve.cap import Group, memory_group
from duoserve.config import size
from duoserve.peers import LLAMA_CPP

COLD, WARM, STEADY = "cold", "warm", "steady"
PHASES = (COLD, WARM, STEADY)
SETTLING = 1  # requests between warm and steady that are not reported
PATIENCE_S = 600.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Contender:
    """`engine`: duoserve, stock, accelerate or llama.cpp. `options` of `duoserve.load` without the model, of
    `peers.open_peer`, or of `llamacpp.Gguf`.

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
    foresees: bool = False  # it is shown the requests of a repetition before that is measured

    @property
    def program(self) -> str:
        """The module that answers for it: llama.cpp's imports no torch."""
        return "duoserve.llamacpp" if self.engine == LLAMA_CPP else "duoserve.contender"


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

    def kept(self, course: Course) -> int:
        """Leave out what was answered of a repetition that was not over; returns how many were."""
        asked = {COLD: 1, WARM: 1, STEADY: course.steady}
        whole = min(len(self.samples[phase]) // n for phase, n in asked.items())
        self.samples = {phase: self.samples[phase][: whole * n] for phase, n in asked.items()}
        self.load_s = self.load_s[:whole]
        return whole


class Failed(Exception):
    """A contender did not answer; the message says why, in a line."""


class Stop(KeyboardInterrupt):
    """Somebody asks to stop, by this signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Stopped(Exception):
    """It was, and everything is cleaned up; what was answered until then."""

    def __init__(self, number: int, outcomes: list[Outcome]):
        super().__init__(number, outcomes)
        self.number, self.outcomes = number, outcomes


@contextmanager
def stoppable() -> Iterator[None]:
    """The first of these signals raises `Stop`; none is heard while what it ended is cleaned up."""
    former = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, frame: Any) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stop(number)

    try:
        for number in SIGNALS:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class Process:
    """A contender in a process of its own, within its cap."""

    command: ClassVar[list[str]] = [sys.executable, "-m"]

    def __init__(self, contender: Contender, number: int, stack: ExitStack, patience_s: float = PATIENCE_S):
        self.contender, self._patience_s = contender, patience_s
        self._said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        command = [*self.command, contender.program]
        self._group: Group | None = None
        if contender.cap is not None:
            self._group = stack.enter_context(memory_group(contender.cap, str(number)))
            command = ["sh", "-c", f'echo $$ > "{self._group.procs}" && exec "$@"', "sh", *command]
        env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(  # a session of its own: Ctrl-C in a terminal is for us, who end it
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=env, start_new_session=True
        )
        stack.push(self._leave)
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

    def _leave(self, kind: type[BaseException] | None, *about: Any) -> None:
        """Let it go; where somebody asked to stop, at once."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._process.kill()
        self.end()

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
    """Outcomes of every contender in every cell, in that order. A contender that fails has them with an error.

    Raises `Stopped` where a `Stop` rose, once all processes and groups are gone.
    """
    groups = [list(contenders)] if in_turns else [[one] for one in contenders]
    found: list[Outcome] = []
    try:
        for number, group in enumerate(groups):
            outcomes = [[Outcome(one, cell) for cell in cells] for one in group]
            found += [outcome for of in outcomes for outcome in of]
            with ExitStack() as stack:
                started = [_started(one, at, stack, course, say) for at, one in enumerate(group, number)]
                _group([_ready(process) for process in started], outcomes, course, say)
    except Stop as stop:
        raise Stopped(stop.number, _answered(found, course)) from stop
    return found


def _answered(outcomes: list[Outcome], course: Course) -> list[Outcome]:
    """Those that failed, and those that answered all of a repetition."""
    return [outcome for outcome in outcomes if outcome.error or outcome.kept(course)]


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


def _group(started: list[Process | str], outcomes: list[list[Outcome]], course: Course, say: Say) -> None:
    """Fill the outcomes, by contender and cell."""
    for process, of in zip(started, outcomes, strict=True):
        for outcome in of:
            outcome.error = process if isinstance(process, str) else None
    for in_cell in zip(*outcomes, strict=True):
        cell = in_cell[0].cell
        for repetition in range(course.repetitions):
            say(f"{cell.prompts}, batch {cell.batch}: repetition {repetition + 1} of {course.repetitions}")
            coming = list(_requests(cell, repetition, course))
            for phase, request in coming:
                for i in _rotated(len(started), repetition):
                    process = started[i]
                    if isinstance(process, Process):
                        shown = [r for _, r in coming] if phase == COLD and in_cell[i].contender.foresees else None
                        _turn(process, in_cell[i], phase, request, course, shown)


def _rotated(n: int, by: int) -> list[int]:
    order = list(range(n))
    return order[by % n :] + order[: by % n]


def _requests(cell: Cell, repetition: int, course: Course) -> Iterator[tuple[str | None, Request]]:
    """The requests of one repetition with their phases; None is not reported."""
    phases = [COLD, WARM, *[None] * SETTLING, *[STEADY] * course.steady]
    for number, phase in enumerate(phases, repetition * (len(phases) + 1)):  # each phase meets other prompts
        yield phase, cell.requests[number % len(cell.requests)]


def _turn(
    process: Process,
    outcome: Outcome,
    phase: str | None,
    request: Request,
    course: Course,
    shown: list[Request] | None = None,
) -> None:
    """One request to one contender, who may be `shown` what will come; a process that is gone stays so, in all cells."""
    if outcome.error is not None:
        return
    try:
        if shown is not None:
            process.ask("record", requests=[one._asdict() for one in shown], new_tokens=course.new_tokens)
        if phase == COLD:
            about = process.ask("open")
            outcome.load_s.append(about.pop("load_s"))
            outcome.about = about
        sample = process.ask("run", **request._asdict(), new_tokens=course.new_tokens)
        if phase is not None:
            outcome.samples[phase].append(sample)
    except Failed as failed:
        outcome.error = str(failed)
