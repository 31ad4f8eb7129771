"""What a user would run instead: stock transformers, and Accelerate with what does not fit on disk, found by what is
installed. Knows how each loads a checkpoint; knows nothing of ours.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from duoserve.core import Refusal, nearest

PEERS = {"stock": "transformers", "accelerate": "accelerate"}  # name -> package


def chosen(asked: str) -> list[str]:
    """The peers of "none", "all" (that are installed) or "stock,accelerate"; refuses unknown and missing ones."""
    if asked == "none":
        return []
    if asked == "all":
        return [name for name in PEERS if _version(name) is not None]
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in PEERS:
            raise Refusal("E_OPTION", f"unknown peer {name!r}", nearest(name, ("none", "all", *PEERS)))
        if _version(name) is None:
            raise Refusal("E_OPTION", f"peer {name!r} is not installed", f"pip install {PEERS[name]}")
    return names


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
