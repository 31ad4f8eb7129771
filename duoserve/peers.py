"""What a user would run instead: stock transformers, Accelerate with what does not fit on disk, and llama.cpp, found by what
is installed. Knows how each is asked for, and how the first two load a checkpoint (llama.cpp's is `llamacpp.py`); knows
nothing of ours.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from duoserve.core import Refusal, nearest

LLAMA_CPP = "llama.cpp"
PEERS = {"stock": "transformers", "accelerate": "accelerate", LLAMA_CPP: "llama-cpp-python"}  # name -> package


def chosen(asked: str, gguf: Path | None = None) -> list[str]:
    """The peers of "none", "all" (that are installed) or "stock,accelerate"; refuses unknown and missing ones.

    llama.cpp is one where `gguf` names the model in its format.
    """
    if asked == "none":
        return []
    if gguf is not None:
        _check_gguf(gguf)
    if asked == "all":
        return [name for name in PEERS if _version(name) is not None and (name != LLAMA_CPP or gguf is not None)]
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in PEERS:
            raise Refusal("E_OPTION", f"unknown peer {name!r}", nearest(name, ("none", "all", *PEERS)))
        if _version(name) is None:
            raise Refusal("E_OPTION", f"peer {name!r} is not installed", f"pip install {PEERS[name]}")
        if name == LLAMA_CPP and gguf is None:
            raise Refusal("E_OPTION", f"peer {name!r} has 0 GGUF files", "name the same model's with --gguf FILE")
    return names


def _check_gguf(path: Path) -> None:
    """Its first bytes; the rest is llama.cpp's to read."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise Refusal("E_MODEL", f"{path} cannot be read ({error.strerror})", "name a GGUF file", 3) from error
    if magic != b"GGUF":
        raise Refusal("E_MODEL", f"{path} is no GGUF: it begins with {magic!r}", "name a GGUF of the same model", 3)


def _version(name: str) -> str | None:
    try:
        return metadata.version(PEERS[name])
    except metadata.PackageNotFoundError:
        return None


def open_peer(name: str, folder: Path, dtype: str, device: str, memory: int | None, scratch: Path) -> Any:
    """The checkpoint as the peer loads it. `memory`: bytes that Accelerate may fill with weights before the rest goes to
    disk, in `scratch`; transformers takes what it needs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if name == "accelerate":
        places: dict[Any, Any] = {"cpu": memory} if device == "cpu" else {0: memory, "cpu": "100GiB"}
        options |= {"device_map": "auto", "max_memory": places, "offload_folder": str(scratch)}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options).eval()
    return model if name == "accelerate" or device == "cpu" else model.to(device)
