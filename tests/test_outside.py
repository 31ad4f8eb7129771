"""Other people's clients, unmodified, against a server of ours. They live in an environment of their own: the extra
`clients` here, or a python named by CLIENTS_PYTHON. Slow, and skipped with a reason where they are not installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import prompter
import pytest
from servers import Running, running
from test_tools import HERMES_TEMPLATE

import duoserve
from benchmarks import lm_eval_items
from duoserve.service import Limits

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("CLIENTS_PYTHON", sys.executable)
OUTSIDE = Path(__file__).parent / "outside"


def need(*modules: str) -> None:
    missing = f"import importlib.util as u; print(*(m for m in {modules!r} if u.find_spec(m) is None))"
    found = subprocess.run([PYTHON, "-c", missing], capture_output=True, text=True, check=True).stdout.split()
    if found:
        pytest.skip(f"{', '.join(found)} not installed: pip install '.[clients]', or name a python in CLIENTS_PYTHON")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """The demo with a template that knows tools, which its own does not."""
    with duoserve.load(None, predictor="none", sequences=4) as engine:
        engine.tokenizer.chat_template = HERMES_TEMPLATE
        with running(engine, Limits(active=4, queue=64, per_client=64)) as server:
            yield server


def outside(*command: str, **env: str) -> str:
    done = subprocess.run(
        [PYTHON, *command], env=os.environ | env, cwd=OUTSIDE, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_lm_eval_s_two_hundred_items_are_those_of_this_process(server: Running, tmp_path: Path) -> None:
    need("lm_eval", "transformers", "aiohttp", "tenacity")
    made = lm_eval_items.items(200)
    samples = lm_eval_items.evaluated(PYTHON, server.port, made, tmp_path, at_once=4)
    assert len(samples) == 200
    with duoserve.load(None, predictor="none") as engine:
        found = lm_eval_items.compare(engine, samples)
    print(found)
    assert found["differ"] == 0 and 0.3 < found["acc"] < 1  # 0.25 would be chance: the items mean something


def test_litellm_chats_streams_and_calls(server: Running) -> None:
    need("litellm")
    assert '"calls": 7' in outside("litellm_client.py", server.url, "tools")


def test_langchain_s_own_tests_of_chat_models_pass(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    need("langchain_openai", "langchain_tests", "pytest_asyncio")
    prompter.prompt(server.host.model.engine, monkeypatch)
    options = [
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(OUTSIDE),
        "--tb=short",
    ]
    options += ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
    out = outside("-m", "pytest", *options, "langchain_standard.py", DUOSERVE_URL=server.url)
    print(out[-300:])
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 35
