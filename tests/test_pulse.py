"""Whatever takes long gives signs of life: in a terminal on one line that is wiped, in a pipe on lines, and no more."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duoserve import pulse

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "EVERY_S", 0.02)


def lines(capfd: Any, of: int, within_s: float = 20) -> Iterator[str]:
    """That many lines, as they come."""
    until, seen = time.monotonic() + within_s, ""
    while seen.count("\n") < of:
        assert time.monotonic() < until, seen
        time.sleep(0.005)
        seen += capfd.readouterr().err
    yield from seen.splitlines()[:of]


def test_a_pipe_hears_lines_until_it_is_over(capfd: Any) -> None:
    with pulse.pulsing("loading the demo") as beating:
        assert all(line.startswith("loading the demo ... ") and line.endswith(" s") for line in lines(capfd, 3))
        beating.tell(5 << 20, 20 << 20, "converting")
        assert any(line.startswith("converting: 5 of 20 MiB ... ") for line in lines(capfd, 4))
    capfd.readouterr()
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_what_is_quick_is_silent(capfd: Any) -> None:
    with pulse.pulsing("loading"):
        pass
    time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


def test_it_keeps_quiet_beside_who_speaks(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "EVERY_S", 0.2)
    said: list[int] = []
    with pulse.pulsing("loading") as beating:
        tell = beating.beside(lambda done, total, what: said.append(done))
        for done in range(50):
            tell(done, 50, "converting")
            time.sleep(0.01)
    assert said == list(range(50)) and capfd.readouterr().err == ""


def test_a_terminal_sees_one_line_that_is_wiped(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pulse.pulsing("loading") as beating:
        seen = ""
        while seen.count("loading ... ") < 3:
            time.sleep(0.005)
            seen += capfd.readouterr().err
        assert "\n" not in seen
    assert (seen + capfd.readouterr().err).endswith(" " * len("loading ... 0 s") + "\r")
    with pulse.pulsing("loading", terminals=False) as beating:
        time.sleep(0.1)
        beating.tell(1, 2, "x")
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_chat_that_loads_shows_it_before_the_answer(tmp_path: Path) -> None:
    """The order of what a terminal shows, with a beat so quick that there is one however fast the machine is."""
    script = "import duoserve.pulse as p; p.EVERY_S = 0.01; from duoserve import cli; cli.main()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "DUOSERVE_CACHE": str(tmp_path), "TERM": "xterm"}
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-c", script, "chat", "-p", "What is Git?", "--max-new-tokens", "2"]
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while piece := _read(terminal):
            shown += piece
    os.close(terminal)
    assert process.returncode == 0, shown
    first, beat, answer = (
        shown.index(words) for words in (b"loading the demo ...\r\n", b"loading the demo ... 0 s", b"Git")
    )
    assert first < beat < answer, shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 12)
    except OSError:  # nobody writes to it any more
        return b""
