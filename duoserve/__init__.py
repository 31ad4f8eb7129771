"""DuoServe: run Mixture-of-Experts models whose experts do not fit in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from duoserve.version import __version__

if TYPE_CHECKING:
    from duoserve.engine import Engine
    from duoserve.opening import load

__all__ = ["Engine", "__version__", "load"]


def __getattr__(name: str) -> Any:  # torch is imported when first needed, not by `import duoserve`
    if name in __all__:
        from duoserve import engine, opening

        return opening.load if name == "load" else getattr(engine, name)
    raise AttributeError(f"module 'duoserve' has no attribute {name!r}")
