"""What is served: a model that loads, then answers, then drains. Knows the stages; knows nothing of HTTP."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from duoserve.api.errors import ApiError

if TYPE_CHECKING:
    from duoserve.engine import Engine
    from duoserve.service import Service


class Model(NamedTuple):
    """A loaded model and who answers with it."""

    engine: Engine
    service: Service


class Host:
    """One model by its public name. Written by who loads it, read by the handlers."""

    def __init__(self, name: str):
        self.name, self._began = name, time.time()
        self.created = int(self._began)
        self.draining = False
        self._model: Model | None = None
        self._progress: tuple[int, int, str] = (0, 0, "loading")

    def progress(self, done: int, total: int, what: str) -> None:
        """As `duoserve.load` tells it, on any thread."""
        self._progress = (done, total, what)

    def ready(self, engine: Engine, service: Service) -> None:
        self._model = Model(engine, service)

    @property
    def loaded(self) -> Model | None:
        return self._model

    @property
    def model(self) -> Model:
        """ApiError 503 until it has been loaded, and once it drains."""
        if self._model is None or self.draining:
            stage = "shutting down" if self.draining else f"loading ({self._progress[2]})"
            code = "shutting_down" if self.draining else "loading"
            raise ApiError(503, f"the server is {stage}; try again in 5 s", code=code, retry_s=5)
        return self._model

    def check_name(self, name: str) -> None:
        if name != self.name:
            message = f"model {name[:80]!r} is not served; ask for {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def health(self) -> dict[str, Any]:
        done, total, what = self._progress
        status = "draining" if self.draining else "ready" if self._model else "loading"
        found: dict[str, Any] = {"live": True, "ready": status == "ready", "status": status, "model": self.name}
        if status == "loading":
            share = round(done / total, 4) if total else None
            seconds = round(time.time() - self._began, 1)
            found["progress"] = {"done": done, "total": total, "what": what, "share": share, "seconds": seconds}
        return found
