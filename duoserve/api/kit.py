"""What a handler needs of a loaded model. Put together once per model; knows nothing of requests."""

from __future__ import annotations

from duoserve.api.host import Host, Model
from duoserve.api.metrics import Metrics
from duoserve.api.rendering import Rendering
from duoserve.api.tokens import Tokens


class Kit:
    def __init__(self, host: Host, model: Model, metrics: Metrics):
        self.host, self.metrics = host, metrics
        self.engine, self.service = model.engine, model.service
        self.rendering, self.tokens = Rendering(model.engine, model.service.ends), Tokens(model.engine.tokenizer)
        self.fingerprint = f"duoserve-{model.engine.store.fingerprint}"
