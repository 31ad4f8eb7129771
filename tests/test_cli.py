"""The command line as a user meets it: real processes, real terminals. What a process of its own would not show better runs
in this one, which saves the seconds that imports take.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duoserve import cli, console

COMMAND = [sys.executable, "-m", "duoserve.cli"]


def run(cache: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"DUOSERVE_CACHE": str(cache)}
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, env=env, timeout=240, **options)


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """`here("chat", ...)`: as `run`, in this process."""

    def call(*args: str, within: Path = cache) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("DUOSERVE_CACHE", str(within))
        monkeypatch.setattr(sys, "argv", ["duoserve", *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        return subprocess.CompletedProcess(args, int(done.value.code or 0), *capfd.readouterr())

    return call


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['duoserve', '--help']\nfrom duoserve.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip().endswith("[]"), out.stdout + out.stderr
    assert "chat" in out.stdout and "convert" in out.stdout


def test_version() -> None:
    assert re.fullmatch(r"duoserve \d+\.\d+\.\d+\n", run(Path(), "--version").stdout)


def test_one_prompt_with_figures_and_a_seed_that_repeats_it(cache: Path, here: Here) -> None:
    asked = ("chat", "--prompt", "What is a list?", "--max-new-tokens", "24", "--seed", "1", "--json")
    done, again = run(cache, *asked), here(*asked)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    wanted = "text prompt_tokens new_tokens ttft_s decode_tok_s residency hits in_flight misses bytes_moved link_gbps "
    wanted += "budget_bytes used_bytes"
    assert set(wanted.split()) <= set(figures)
    assert figures["text"].strip() in done.stdout and figures["residency"] == 0.5
    assert 0 < figures["used_bytes"] <= figures["budget_bytes"]
    assert json.loads(again.stdout.splitlines()[-1])["text"] == figures["text"]
    other = here(*asked[:5], "--seed", "2", "--json")
    assert json.loads(other.stdout.splitlines()[-1])["text"] != figures["text"]


def test_lines_from_a_pipe_are_turns(cache: Path) -> None:
    done = run(
        cache, "chat", "--max-new-tokens", "8", "--json", input="What is a list?\n/stats\n/nonsense\nAnd a tuple?\n"
    )
    assert done.returncode == 0 and "unknown command /nonsense" in done.stderr and "hit" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["new_tokens"] > 0


def test_a_bare_command_shows_the_help(cache: Path) -> None:
    done = run(cache)
    assert done.returncode == 2 and "chat" in done.stdout + done.stderr and "error" not in done.stderr


def test_bad_lines_do_not_end_a_chat(cache: Path) -> None:
    said = b"/set temperature nan\n/set top_k -3\ncaf\xe9\n/set seed x\nHello!\n"
    env = os.environ | {"DUOSERVE_CACHE": str(cache), "PYTHONUTF8": "1"}
    done = subprocess.run(
        [*COMMAND, "chat", "--max-new-tokens", "4"], input=said, capture_output=True, env=env, timeout=240
    )
    assert done.returncode == 0 and done.stderr.count(b"error: E_") >= 3, done.stderr


def test_a_damaged_cached_store_is_made_again(cache: Path, tmp_path: Path, here: Here) -> None:
    import shutil

    shutil.copytree(cache, tmp_path / "c")
    (victim,) = (tmp_path / "c" / "stores").glob("demo-*-int4/experts-002.safetensors")
    victim.write_bytes(victim.read_bytes()[:-1])
    done = here("chat", "-p", "Hello!", "--max-new-tokens", "4", within=tmp_path / "c")
    assert done.returncode == 0, done.stderr


def test_convert_then_chat_with_the_store(toy: Any, tmp_path: Path, here: Here) -> None:
    done = here("convert", str(toy("mixtral")), "-o", str(tmp_path / "store"), "--format", "nf4")
    assert done.returncode == 0 and "nf4 expert store" in done.stdout, done.stderr
    done = here("chat", str(tmp_path / "store"), "-p", "x")
    assert done.returncode == 3 and "E_TOKENIZER" in done.stderr, "toys have no tokenizer"


def test_closed_streams_and_a_narrow_alphabet_do_not_end_a_command(tmp_path: Path) -> None:
    (tmp_path / "stores" / "caf\u00e9 \u2603").mkdir(parents=True)
    (tmp_path / "stores" / "caf\u00e9 \u2603" / "x").write_text("x")
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    ls = shlex.join([*COMMAND, "ls", "--cache-dir", str(tmp_path)])
    done = subprocess.run(["sh", "-c", f"{ls} <&- 2>&-"], capture_output=True, env=env, timeout=60)
    assert done.returncode == 0 and b"caf? ? is no store" in done.stdout, done
    opens = "import os; from duoserve import console; console.prepare(); print(os.open('/dev/null', 0))"
    opens = shlex.join([sys.executable, "-c", opens])
    done = subprocess.run(["sh", "-c", f"{opens} <&- 2>&-"], capture_output=True, timeout=60)
    assert int(done.stdout) > 2, "a file of ours got the number of a standard stream"


def test_a_warning_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    console.prepare()
    warnings.showwarning(UserWarning("one\x1b[2J\ntwo"), UserWarning, "file.py", 1)
    assert capfd.readouterr().err == "warning: one\\x1b[2J\n"


CASES = [
    (("chta",), 2, "Did you mean 'chat'"),
    (("chat", "--budjet", "1GiB"), 2, "--budget"),
    (("chat", "--budget", "lots"), 2, "is not a size"),
    (("chat", "--format", "int3"), 2, "did you mean 'int4'"),
    (("chat", "--device", "gpu"), 2, "known: auto, cpu, cuda"),
    (("chat", "--ctx", "many"), 2, "not a number of tokens"),
    (("chat", "no/such/folder", "-p", "x"), 3, "no model folder"),
    (("chat", "nobody/nothing-here", "-p", "x"), 3, "offline mode is on"),
    (("convert", "nowhere", "-o", "out"), 3, "no model folder"),
    (("convert",), 2, "Missing"),
    (("chat", "--max-new-tokens", "0", "-p", "x"), 2, "max_new_tokens 0 is out of range"),
    (("chat", "--temperature=-1", "-p", "x"), 2, "temperature -1.0 is out of range"),
    (("chat", "--budget=-5%", "-p", "x"), 2, "is not a share"),
    (("chat", "--budget", "9" * 400 + "G", "-p", "x"), 2, "is not a size"),
    (("chat", "--budget", "9" * 400 + "%", "-p", "x"), 2, "is not a share"),
    (("chat", "--ctx", "9" * 5000, "-p", "x"), 2, "is not a number of tokens"),
    (("chat", "--link", "0", "-p", "x"), 2, "moves nothing"),
    (("chat", "-p", " \n"), 2, "the prompt has 0 words"),
    (("chat", "--timeline", ".", "-p", "x"), 2, "is a folder"),
    (("bench", "--output", "."), 2, "is a folder"),
    (("train", "nowhere", "-o", "."), 2, "no predictor's"),
    (("verify", "."), 3, "no manifest"),
    (("convert", ".", "-o", "/proc/store"), 3, "config.json"),
]


@pytest.mark.parametrize(("args", "status", "says"), CASES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else None)
def test_errors_are_one_line_with_an_exit_code(here: Here, args: tuple[str, ...], status: int, says: str) -> None:
    one_error(here(*args), status, says)


def test_a_process_that_loads_says_one_line_too(cache: Path) -> None:
    one_error(run(cache, "chat", "--budget", "1MiB", "-p", "x"), 4, "the smallest is")


def one_error(done: subprocess.CompletedProcess[str], status: int, says: str) -> None:
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.fullmatch(r"loading .* \d+ s", line)]  # signs of life
    assert len(lines) == 1 and lines[0].startswith("error: E_") and says in lines[0], done.stderr


@pytest.mark.parametrize(
    ("family", "says"), [("llama", "E_NOT_MOE"), ("llama4_text", "E_LAYOUT"), ("jetmoe", "E_LAYOUT")]
)
def test_models_we_cannot_serve_are_refused(here: Here, tmp_path: Path, family: str, says: str) -> None:
    import toys

    small = toys._BASE | {"intermediate_size": 96, "num_hidden_layers": 1}
    special = {"llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 96, "head_dim": 16},
               "jetmoe": {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}}  # fmt: skip
    folder = toys.make(tmp_path / family, family, **(small | special.get(family, {})))
    one_error(here("chat", str(folder), "-p", "x"), 2, says)


class Terminal:
    """The program on a pseudo-terminal, as a person sees it."""

    def __init__(self, cache: Path, *args: str):
        pid, self.fd = pty.fork()
        if pid == 0:
            os.environ |= {"DUOSERVE_CACHE": str(cache), "TERM": "dumb"}
            os.execv(sys.executable, [*COMMAND, *args])
        self.pid, self.unread = pid, ""

    def until(self, text: str, seconds: float = 120) -> str:
        """Read until `text` comes, after what was returned before; returns what came up to its end."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"no {text!r} in {self.unread!r}"
            self.unread += os.read(self.fd, 4096).decode(errors="replace")
        came, _, self.unread = self.unread.partition(text)
        return came + text

    def say(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def leave(self) -> int:
        self.say("/quit")
        while True:
            try:
                if not os.read(self.fd, 4096):
                    break
            except OSError:  # the other end closed
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_in_a_terminal(cache: Path) -> None:
    chat = Terminal(cache, "chat", "--temperature", "0", "--max-new-tokens", "600")
    assert "96 of 192 experts fit" in chat.until("> ")
    chat.say("/help")
    assert "/retry" in chat.until("> ")
    chat.say("/set max_new_tokens 16")
    chat.until("seed=model default\r\n> ")
    chat.say("What is a list?")
    chat.until("\n> ")
    chat.say("/set temprature 3")
    assert "did you mean 'temperature'" in chat.until("\n> ")
    chat.say("/stats")
    assert "experts" in chat.until("budget")
    chat.until("> ")
    chat.say("/retry")
    chat.until("\n> ")
    chat.say("/clear")
    chat.until("conversation cleared")
    assert chat.leave() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(cache: Path) -> None:
    chat = Terminal(cache, "chat", "--temperature", "0", "--max-new-tokens", "900")
    chat.until("> ")
    chat.say("What is a list?")
    chat.until("\n")
    time.sleep(0.3)
    os.kill(chat.pid, signal.SIGINT)
    chat.until("> ")
    chat.say("/set max_new_tokens 4")
    chat.until("max_new_tokens=4")
    chat.say("And a tuple?")
    chat.until("And a tuple?")  # its echo: the prompt before it is not the one after the answer
    chat.until("> ")
    os.kill(chat.pid, signal.SIGINT)
    chat.until("leaves")
    assert chat.leave() == 0
