"""From the name of a model to a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from duoserve.core import Refusal

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model: str | os.PathLike[str]) -> Path:
    """The folder behind MODEL: a path, or a hub id downloaded (or found in the hub cache, offline) by huggingface_hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(model)
    if path.exists() or not _HUB_ID.fullmatch(name) or name.count("/") != 1:
        raise Refusal(
            "E_MODEL", f"no model folder {name!r} here", "give a checkpoint folder, an expert store or a hub id", 3
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"],
                ignore_patterns=["*/*", "consolidated*"],  # the same weights once more, in other layouts
            )
        )
    except Exception as error:  # the hub's many ways to say no, in one line
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise Refusal(
            "E_MODEL",
            f"{name!r} is no folder here and the hub gave no such model ({reason})",
            "check the name and the network",
            3,
        ) from error
