"""How what a user may meet comes about: things harmed, taken or missing. For the cases of test_errors.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import toys
from hubs import COMMIT, Hub, reach, serving

import duoserve
from dep_extension import calibrate
from dep_extension.cost import Line, Machine, Split
from dep_extension.kernel_choice import Point, Shape, Table
from duoserve import checkpoint, cli, codec, peers, prompts, shelf, tracing
from duoserve import serving as serving_
from duoserve.convert import convert
from duoserve.core import Key, Refusal
from duoserve.device import host_arena
from duoserve.durable import exclusive
from duoserve.runfile import Run, write_run
from duoserve.store import Store


class Kit(NamedTuple):
    """What a case may use."""

    toy: Callable[..., Path]
    load: Callable[..., Any]
    tmp: Path
    patch: pytest.MonkeyPatch
    stack: contextlib.ExitStack

    def kernel_table(self, machine: str) -> str:
        path = self.tmp / "kernels.json"
        Table(machine, {Shape(8, 8, 2, "float32"): (Point(1, 1e-3, 1e-3),)}).save(path)
        return str(path)

    def folder(self, **files: Any) -> Path:
        """A folder of JSON files, or of raw bytes; `__` in a name is a dot."""
        folder = self.tmp / "model"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name.replace("__", ".")).write_bytes(data)
        return folder

    def checkpoint(self, family: str = "mixtral", **config: Any) -> Path:
        """A copy of a toy checkpoint that may be harmed, its config changed."""
        folder = shutil.copytree(self.toy(family), self.tmp / "checkpoint")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    def harmed_shard(self, harm: Callable[[Path], Any]) -> Path:
        folder = self.checkpoint()
        harm(min(folder.glob("model-*")))
        return folder

    def store(self, harm: Callable[[Path], None] = lambda folder: None) -> Path:
        folder = convert(self.toy("mixtral"), self.tmp / "store")
        harm(folder)
        return folder

    def hub(self, model: str) -> str:
        """`model`, once there is a hub with org/toy, org/gated and org/down."""
        status = {"org/gated": (403, "GatedRepo"), "org/down": (500, "")}
        hub = Hub({"org/toy": {COMMIT: self.toy("mixtral")}}, {"main": COMMIT}, status)
        reach(self.stack.enter_context(serving(hub)), self.patch, self.tmp / "hf")
        return model

    def port(self) -> None:
        """Listen where somebody does."""
        taken = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        with serving_._listening("127.0.0.1", taken.getsockname()[1]):
            pass

    def shelf(self) -> Path:
        """A cache with two stores that were begun."""
        for name in ("mixtral-aa-int4", "mixtral-bb-int4"):
            (self.tmp / "stores" / name).mkdir(parents=True)
            (self.tmp / "stores" / name / "trunk.safetensors").write_bytes(b"")
        return self.tmp / "stores"

    def command(self, *args: str) -> None:
        """The command line, in this process; its exit status and its one line as a Refusal."""
        self.patch.setattr(sys, "argv", ["duoserve", *args])
        said: list[str] = []
        self.patch.setattr(cli, "_say", lambda line, status: said.append(line) or status)
        status = cli._guarded()
        code, _, rest = said[0].partition(": ")
        what, _, remedy = rest.rpartition("; ") if "; " in rest else (rest, "", rest)
        raise Refusal(code, what, remedy, status)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def calibrated(kit: Kit, old: str = "", new: str = "") -> Path:
    """A machine's costs as `calibrate` writes them, something in them replaced."""
    line, path = Line(1e-3, 1e-12), kit.tmp / "machine.json"
    calibrate.save(Machine("2 x toy", 2, 8e9, line, line, {Split(1, 1): line}), path)
    text = path.read_text()
    path.write_text(re.sub(r"\[\s+", "[", text).replace(old, new, 1) if old else text)
    return path


def processor(kit: Kit) -> Path:
    data = json.loads((Path(duoserve.__file__).parent / "machines" / "h200.json").read_text())
    path = kit.tmp / "cpu.json"
    path.write_text(json.dumps(data | {"device": "cpu", "link": None}))
    return path


def loads(kit: Kit, rows: list[list[float]]) -> Path:
    path = kit.tmp / "loads.json"
    path.write_text(json.dumps({"kind": "duoserve-dep-loads", "version": 1, "loads": rows}))
    return path


def recorded(kit: Kit) -> Path:
    """A run of a second in which nothing happened."""
    write_run(kit.tmp / "run.json", Run(1.0, [], {}, {}))
    return kit.tmp / "run.json"


def cut(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def weights(kit: Kit, harm: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint of one file whose tensors were changed."""
    from safetensors.torch import load_file, save_file

    folder = kit.checkpoint()
    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    harm(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def narrowed(tensors: dict[str, Any], suffix: str) -> None:
    name = next(n for n in tensors if n.endswith(suffix))
    tensors[name] = tensors[name][:, :8].contiguous()


def generation(kit: Kit, said: Any) -> Path:
    """A checkpoint with a tokenizer, whose publisher says this of how it answers."""
    folder = kit.checkpoint("mixtral")
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


def no_number(tensors: dict[str, Any]) -> None:
    name = next(name for name in sorted(tensors) if name.endswith("experts.0.w2.weight"))
    tensors[name][0, 0] = float("nan")


def busy(kit: Kit) -> None:
    with exclusive(kit.shelf() / "mixtral-aa-int4", print):
        shelf.refuse_in_use(shelf.on_shelf(kit.tmp / "stores"))


def with_folder(kit: Kit) -> None:
    (kit.shelf() / "mixtral-aa-int4" / "photos").mkdir()
    (kit.tmp / "stores" / "mixtral-aa-int4" / "conversion.json").write_text("{}")
    for item in shelf.on_shelf(kit.tmp / "stores"):
        shelf.remove(item)


def traced(kit: Kit, text: str, ctx: int) -> None:
    """Nine prompts at once."""
    prompts = [tracing.Prompt("a", "d", text)] * 9
    tracing.record(kit.load(ctx=ctx), prompts, kit.tmp / "trace", tracing.Run(batch=9))


def changed_set(kit: Kit) -> None:
    folder = shutil.copytree(prompts.SETS, kit.tmp / "sets")
    flip(folder / "prose.jsonl", 30)
    kit.patch.setattr(prompts, "SETS", folder)
    prompts.prompt_set("all")


def capped(kit: Kit) -> None:
    kit.patch.setattr(os, "geteuid", lambda: 1000)
    kit.command("bench", "--cap", "900MiB")


def without_accelerate(kit: Kit) -> None:
    def version(name: str) -> str:
        raise peers.metadata.PackageNotFoundError(name)

    kit.patch.setattr(peers.metadata, "version", version)
    assert peers.chosen("all") == []
    peers.chosen("accelerate")


def without_gguf(kit: Kit) -> None:
    kit.patch.setattr(peers.metadata, "version", lambda name: "1")
    peers.chosen("llama.cpp")


def few_modules(kit: Kit) -> Path:
    kit.patch.setattr(checkpoint, "_MAX_MODULES", 40)
    return kit.toy("mixtral")


def without_room(kit: Kit) -> Path:
    usage = shutil.disk_usage(kit.tmp)
    kit.patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    return kit.tmp


def without_bitsandbytes(kit: Kit) -> Path:
    codec._bitsandbytes.cache_clear()
    kit.patch.setitem(sys.modules, "bitsandbytes", None)
    kit.patch.setitem(sys.modules, "bitsandbytes.functional", None)
    return kit.tmp


def first_touch(kit: Kit) -> None:
    store = Store(kit.store(lambda folder: flip(folder / "experts-001.safetensors", 4096 + 7)))
    try:
        store.read_into(Key(1, 0), host_arena(store.slab_bytes))
    finally:
        store.close()


def raises_enospc(kit: Kit) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "store/experts-000.safetensors")

    kit.patch.setattr("duoserve.convert._write", full)
    kit.command("convert", str(kit.toy("mixtral")), "-o", str(kit.tmp / "out"))


def raises_eio(kit: Kit) -> None:
    def broken(*args: Any) -> None:
        raise OSError(5, "Input/output error", "trunk.safetensors")

    kit.patch.setattr("duoserve.convert._write", broken)
    kit.command("convert", str(kit.toy("mixtral")), "-o", str(kit.tmp / "out"))


def raises_type_error(kit: Kit) -> None:
    kit.patch.setattr("duoserve.convert._write", None)
    kit.command("convert", str(kit.toy("mixtral")), "-o", str(kit.tmp / "out"))


class Strange:
    """A model that does not run on meta."""

    config = type("Config", (), {"model_type": "strange"})

    def __call__(self, **inputs: Any) -> None:
        raise NotImplementedError("no meta kernel")


SMALL = toys._BASE | {"intermediate_size": 96, "num_hidden_layers": 1}
INDEX = "model__safetensors__index__json"
TOOL = {"type": "function", "function": {"name": "f"}}


def nested(depth: int) -> dict[str, Any]:
    return {"not": nested(depth - 1)} if depth > 1 else {}
