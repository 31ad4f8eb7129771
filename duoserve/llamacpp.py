"""llama.cpp as a contender of a benchmark, alone in its process, through the package llama-cpp-python.

    python -m duoserve.llamacpp        the same lines as `duoserve.contender`, "record" apart

It reads a GGUF of the model, mapped as llama.cpp maps it by default, on the CPU, with keys and values in float16. Tokens are
the likeliest ones, the end of a text as good as any. Its clock and counters are those of the other contenders. Knows
llama.cpp's C interface; knows nothing of torch or transformers, which would cost it memory under a cap.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duoserve.cap import forget_files
from duoserve.contest import Contender
from duoserve.stopwatch import Clock, Counts, attend, peak_rss, read_bytes

_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_ROWS = 512  # of a prompt that are multiplied at once: llama.cpp's default


class Row(NamedTuple):
    """Tokens of one sequence from `position` on."""

    sequence: int
    position: int
    ids: Sequence[int]


class Gguf:
    """A GGUF in llama.cpp. Options: `gguf`, `threads`, `ctx` (tokens of a sequence), `sequences`, `repack`, `expects`.

    `repack`: copy the weights into the order that its kernels read quickest, its default; without it they are computed from
    the mapped file as they are, which a cap smaller than the copies needs. Raises ValueError where the file cannot be loaded
    or has other dimensions than `expects` says ("layers", "hidden").
    """

    def __init__(self, options: dict[str, Any]):
        import llama_cpp

        self._llama, self._n_threads = llama_cpp, options["threads"]
        llama_cpp.llama_backend_init()
        path = str(options["gguf"]).encode()
        self._model: Any = llama_cpp.llama_model_load_from_file(path, self._model_params(options["repack"]))
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {options['gguf']}")
        _check(self._found(), options["expects"])
        params = self._context_params(options["ctx"], options["sequences"])
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp has no room for {options['sequences']} x {options['ctx']} tokens")
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def _model_params(self, repack: bool) -> Any:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, repack
        return params

    def _context_params(self, ctx: int, sequences: int) -> Any:
        params = self._llama.llama_context_default_params()
        params.n_ctx = params.n_batch = ctx * sequences
        params.n_ubatch, params.n_seq_max, params.kv_unified = min(_ROWS, params.n_batch), sequences, True
        params.n_threads = params.n_threads_batch = self._n_threads
        params.offload_kqv = params.op_offload = False
        return params

    def _found(self) -> dict[str, int]:
        llama = self._llama
        return {"layers": llama.llama_model_n_layer(self._model), "hidden": llama.llama_model_n_embd(self._model)}

    def about(self) -> dict[str, Any]:
        said = ctypes.create_string_buffer(256)
        self._llama.llama_model_desc(self._model, said, len(said))
        family, _, format = said.value.decode(errors="replace").split(" ", 2)  # such as "llama 8x7B Q4_0"
        return {
            "device": "cpu",
            "format": format,
            "model_type": family,
            "model_size": self._llama.llama_model_size(self._model),
            "model_n_params": self._llama.llama_model_n_params(self._model),
            "n_threads": self._n_threads,
        }

    def forget(self) -> None:
        """All keys and values."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def logits(self, rows: Sequence[Row]) -> list[Any]:
        """float32 of the vocabulary behind each row, valid until the next call; rows are kept as keys and values."""
        import numpy as np

        llama = self._llama
        batch = llama.llama_batch_init(sum(len(row.ids) for row in rows), 0, 1)
        try:
            last = [_add(batch, row) for row in rows]
            status = llama.llama_decode(self._context, batch)
        finally:
            llama.llama_batch_free(batch)
        if status:
            raise ValueError(f"llama_decode returned {status} for {len(rows)} rows")
        shape = (self._n_vocab,)
        return [np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, at), shape) for at in last]

    def close(self) -> None:
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None


def _add(batch: Any, row: Row) -> int:
    """Append a row's tokens, the last one to have logits; where that one lies."""
    for position, token in enumerate(row.ids, row.position):
        at = batch.n_tokens
        batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
        batch.seq_id[at][0], batch.logits[at] = row.sequence, 0
        batch.n_tokens += 1
    batch.logits[at] = 1
    return int(at)


def _check(found: dict[str, int], expected: dict[str, int]) -> None:
    for name, n in expected.items():
        if found[name] != n:
            raise ValueError(f"the GGUF is of another model: {name} {found[name]}, the checkpoint has {n}")


def run(gguf: Gguf, ids: list[list[int]], mask: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Figures of one request, as `contender.run` has them. Padding is left out."""
    rows = [
        Row(at, 0, [token for token, kept in zip(row, kept_of, strict=True) if kept])
        for at, (row, kept_of) in enumerate(zip(ids, mask, strict=True))
    ]
    tokens: list[list[int]] = [[] for _ in rows]
    clock = Clock(_counts)
    gguf.forget()
    while len(tokens[0]) < new_tokens:
        for made, logits in zip(tokens, gguf.logits(rows), strict=True):
            made.append(int(logits.argmax()))
        clock.tick()
        rows = [
            Row(row.sequence, row.position + len(row.ids), made[-1:]) for row, made in zip(rows, tokens, strict=True)
        ]
    return clock.figures() | {
        "prompt_tokens": sum(map(sum, mask)) / len(mask),
        "stall_s": {},
        "tokens": tokens,
        "rss_peak_bytes": peak_rss(),
        "used_bytes": None,
    }


def _counts() -> Counts:
    return Counts(read=read_bytes())


class Service:
    """Loads and answers."""

    def __init__(self, contender: Contender, scratch: Path):
        self._contender = contender
        self._gguf: Gguf | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request.pop("do")
        if do == "ready":
            import llama_cpp  # noqa: F401  imported here, not while others are measured

            return {}
        if do == "open":
            return self.open()
        assert self._gguf is not None, do
        return run(self._gguf, request["ids"], request["mask"], request["new_tokens"])

    def open(self) -> dict[str, Any]:
        """What the loader leaves in memory is its own affair: it maps, and reads ahead as it sees fit."""
        self.close()
        for path in files(Path(self._contender.options["gguf"])):
            forget_files(path)
        began = time.perf_counter()
        self._gguf = Gguf(self._contender.options)
        load_s = time.perf_counter() - began
        return self._gguf.about() | {"load_s": load_s, "rss_peak_bytes": peak_rss()}

    def close(self) -> None:
        if self._gguf is not None:
            self._gguf.close()
        self._gguf = None
        gc.collect()


def files(gguf: Path) -> Iterator[Path]:
    """All parts of a GGUF, named by its first."""
    split = _SPLIT.search(gguf.name)
    if split is None:
        yield gguf
        return
    stem, n = gguf.name[: split.start()], int(split[1])
    yield from (gguf.with_name(f"{stem}-{number:05d}-of-{n:05d}.gguf") for number in range(1, n + 1))


def main() -> None:
    attend(Service)


if __name__ == "__main__":
    main()
