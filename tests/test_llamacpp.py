"""llama.cpp as a peer: asked for, started without torch, given the same model, and measured by the same clock.

What needs the library is skipped where it is not installed.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toys
from test_bench import REQUEST, SETTING, sample
from test_profile import NEEDS

from duoserve import llamacpp, matrix, peers, tally
from duoserve.contest import STEADY, Cell, Contender, Failed, Outcome, Process
from duoserve.core import Refusal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy Mixtral without an end token, and its GGUF in float32."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from benchmarks import gguf_file

    folder = tmp_path_factory.mktemp("mixtral")
    toys.make(folder, "mixtral", eos_token_id=None)
    return folder, gguf_file.make(folder, folder / "toy.gguf", "f32")


def of_llama(file: Path, **changes: Any) -> Contender:
    options = {
        "gguf": str(file),
        "threads": 1,
        "ctx": 32,
        "sequences": 2,
        "repack": True,
        "expects": {"layers": 3, "hidden": 64},
    }
    return Contender("llama.cpp", "llama.cpp", None, str(file), options | changes)


def test_its_logits_are_the_stock_models(model: tuple[Path, Path]) -> None:
    """Keys and values are float16 there, nothing else differs."""
    import torch

    folder, file = model
    ids_1S = toys.ids(1, 11)
    with torch.no_grad():
        wanted = toys.stock(folder)(input_ids=ids_1S).logits[0, -1]
    gguf = llamacpp.Gguf(of_llama(file).options)
    try:
        (found,) = gguf.logits([llamacpp.Row(0, 0, ids_1S[0].tolist())])
        off = (torch.tensor(found.copy()) - wanted).abs().max()
        assert off < 0.005 * wanted.abs().max(), (off, wanted.abs().max())
    finally:
        gguf.close()


def test_it_makes_the_stock_models_tokens_in_a_process_of_its_own(model: tuple[Path, Path]) -> None:
    import torch

    folder, file = model
    wanted = toys.stock(folder).generate(
        input_ids=torch.tensor(REQUEST.ids), attention_mask=torch.tensor(REQUEST.mask), max_new_tokens=6, do_sample=False,
        pad_token_id=0,
    )[:, 4:].tolist()  # fmt: skip
    with ExitStack() as stack:
        process = Process(of_llama(file), 0, stack)
        assert process.ask("ready") == {}
        about = process.ask("open")
        first, again = (process.ask("run", **REQUEST._asdict(), new_tokens=6) for _ in range(2))
    assert first["tokens"] == again["tokens"] == wanted
    assert first["steps"] == 5 and first["prompt_tokens"] == 3 and first["ttft_s"] > 0 and first["decode_s"] > 0
    assert about["model_type"] == "llama" and "F32" in about["format"] and about["n_threads"] == 1
    assert about["model_n_params"] == sum(p.numel() for p in toys.stock(folder).parameters())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"expects": {"layers": 4, "hidden": 64}}, "the GGUF is of another model: layers 3, the checkpoint has 4"),
        ({"gguf": __file__}, "llama.cpp cannot load"),
    ],
)
def test_a_file_that_is_not_this_model_is_a_failure_that_says_so(
    model: tuple[Path, Path], changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        llamacpp.Gguf(of_llama(model[1], **changes).options)


def test_its_process_imports_no_torch() -> None:
    """Under a cap it would pay for what it does not use."""
    code = "import sys; import duoserve.llamacpp; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "set()\n"
    assert of_llama(Path("x.gguf")).program == "duoserve.llamacpp"
    assert Contender("ours", "duoserve", None, ".", {}).program == "duoserve.contender"


def test_it_is_a_peer_where_it_is_installed_and_has_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF....")
    monkeypatch.setattr(peers, "_version", lambda name: "1")
    assert peers.chosen("all") == ["stock", "accelerate"]
    assert peers.chosen("all", file) == ["stock", "accelerate", "llama.cpp"]
    assert peers.chosen("llama.cpp", file) == ["llama.cpp"]
    monkeypatch.setattr(peers, "_version", lambda name: None if name == "llama.cpp" else "1")
    assert peers.chosen("all", file) == ["stock", "accelerate"]
    with pytest.raises(Refusal, match="not installed; pip install llama-cpp-python"):
        peers.chosen("llama.cpp", file)


def test_under_a_cap_without_room_for_copies_its_weights_stay_as_they_lie(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF" + bytes(996))
    assert list(llamacpp.files(parts[0])) == parts
    assert list(llamacpp.files(tmp_path / "m.gguf")) == [tmp_path / "m.gguf"]
    subject: Any = SimpleNamespace(ctx=16, sequences=2, expects={"layers": 3})
    for cap, repacked in ((None, True), (2501, True), (2500, False)):
        who = matrix.llama_cpp("llama.cpp", subject, parts[0], cap, {"threads": 2})
        assert (who.options["repack"], who.options["threads"], who.cap) == (repacked, 2, cap)
    assert matrix.takes(replace(who, cap=None), subject) == 4000 and matrix.takes(who, subject) == 2500


def test_its_limit_is_of_its_own_bits() -> None:
    """4.5 bits a weight where the needs of peers are of 16; keys and values are as wide."""
    rows = {}
    for engine, size in (("stock", 2000), ("llama.cpp", 562)):
        about = {"model_size": size, "model_n_params": 1000, "model_type": "llama", "format": "Q4_0", "device": "cpu"}
        outcome = Outcome(Contender(engine, engine, None, ".", {}), Cell("made up", 1, ()), about)
        outcome.samples[STEADY] = [sample(1.0, moved=0)]
        rows[engine] = tally.record(outcome, STEADY, SETTING)["limit_s"]
    weights = NEEDS.trunk_bytes + NEEDS.active_bytes
    wanted = (0.281 * weights + NEEDS.kv_bytes) / (weights + NEEDS.kv_bytes)
    assert rows["llama.cpp"] / rows["stock"] == pytest.approx(wanted)


def test_a_process_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['llama_cpp'] = None; from duoserve import llamacpp; llamacpp.main()"
    monkeypatch.setattr(Process, "command", [sys.executable, "-c", code])
    with ExitStack() as stack, pytest.raises(Failed, match="llama_cpp"):
        Process(of_llama(Path("x.gguf")), 0, stack).ask("ready")
