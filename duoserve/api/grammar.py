"""Answers that must be JSON, or follow a schema: what may come next, step by step. Knows schemas and token ids; knows
nothing of models, chats or HTTP.

A schema is bounded, compiled once by a process that may be ended (`compiling.py`), then here, and kept while it is used.
Compiling takes up to two seconds and must not happen on an event loop.
"""

from __future__ import annotations

import contextlib
import copy
import json
import select
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np
import torch

from duoserve.api import compiling
from duoserve.core import Refusal
from duoserve.service import Busy

SCHEMA_BYTES = 64 << 10
SCHEMA_DEPTH = 32
REGEX_CHARS = 4 << 10
COMPILE_S = 2.0
KEPT_BYTES = 256 << 20  # of compiled grammars, by `_Grammars.weight`
WAIT_S = 10.0  # for others' grammars to be tried
START_S = 30.0  # for the process to read the tokenizer
BLANKS = r"( |\r?\n[ \t]{0,24})"  # between JSON's tokens: a space, or an indented line; a weak model fills what it may
OURS = "x-guidance"  # what llguidance reads in a schema as instructions to itself


class Mask:
    """What may come next of one answer; a `mask` of `service.Request`. One for each answer: `again` makes another."""

    def __init__(self, grammars: _Grammars, text: str, pristine: llguidance.LLMatcher):
        self._grammars, self._text, self._pristine = grammars, text, pristine
        self._matcher = pristine.deep_copy()
        self._seen = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids generated so far -> bool (V,), V being the tokenizer's vocabulary. Reads only those that are new."""
        new = ids[self._seen :].tolist()
        self._seen += len(new)
        if not self._matcher.consume_tokens(new):
            self._fail()
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._fail()
        allowed_V = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: self._grammars.vocab]
        if not allowed_V.any():
            self._fail()
        return torch.from_numpy(allowed_V.astype(bool))

    def again(self) -> Mask:
        return Mask(self._grammars, self._text, self._pristine)

    def _fail(self) -> None:
        self._grammars.forget(self._text)
        why = " ".join(self._matcher.get_error().split("<")[0].split())[:160] or "no token can follow"
        raise Refusal("E_SCHEMA", f"the grammar failed after {self._seen} tokens ({why})", "simplify the schema")


def mask_for(
    response_format: Mapping[str, Any] | None,
    tokenizer: Any,
    ends: Sequence[int] | None = None,
    written: Callable[[str], str | None] = lambda rule: None,
) -> Mask | None:
    """What an OpenAI `response_format` allows; None where it allows everything.

    `ends`: token ids that end an answer, where they are not only the tokenizer's. `written`: the grammar of an answer around
    a rule for its JSON, where that does not stand alone.
    """
    kind = response_format.get("type") if response_format is not None else "text"
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise Refusal("E_SCHEMA", f"response_format type {kind!r:.60}", "use text, json_object or json_schema")
    assert response_format is not None
    schema = {"type": "object"} if kind == "json_object" else _schema_of(response_format)
    around = written(json_rule(schema))
    return mask_of(json_grammar(schema) if around is None else lark_grammar(around), tokenizer, ends)


def _schema_of(response_format: Mapping[str, Any]) -> dict[str, Any]:
    named = response_format.get("json_schema")
    if not isinstance(named, Mapping) or "schema" not in named:
        raise Refusal("E_SCHEMA", "response_format has 0 schemas", "put one under json_schema.schema")
    return check_schema(named["schema"])


def check_schema(schema: Any) -> dict[str, Any]:
    """The schema, if it is an object within the bounds and refers to nothing outside itself."""
    if not isinstance(schema, dict):
        raise Refusal("E_SCHEMA", f"the schema is a {type(schema).__name__}", "write a JSON object")
    for depth, key, value in _walk(schema):
        if depth > SCHEMA_DEPTH:
            raise _too("is more than", SCHEMA_DEPTH, "levels deep")
        if key == "pattern" and isinstance(value, str) and len(value) > REGEX_CHARS:
            raise _too(f"has a pattern of {len(value)} characters, at most", REGEX_CHARS, "may be")
        if key == "patternProperties" and isinstance(value, dict):
            longest = max((len(pattern) for pattern in value), default=0)
            if longest > REGEX_CHARS:
                raise _too(f"has a pattern of {longest} characters, at most", REGEX_CHARS, "may be")
        if key == "$ref" and isinstance(value, str) and not value.startswith("#"):
            raise Refusal("E_SCHEMA", f"the schema refers to {value!r:.80}, outside itself", 'refer to "#/$defs/..."')
    if OURS in schema:
        raise Refusal("E_SCHEMA", f"the schema has {OURS!r}, which is no keyword", "leave it out")
    size = len(as_text(schema).encode())
    if size > SCHEMA_BYTES:
        raise _too(f"has {size} bytes, at most", SCHEMA_BYTES, "may be")
    return schema


def _too(what: str, most: int, of: str) -> Refusal:
    return Refusal("E_SCHEMA", f"the schema {what} {most} {of}", "make it smaller")


def as_text(value: Any) -> str:
    """JSON; refused for what JSON has not: NaN, half characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal("E_SCHEMA", f"the schema is no JSON ({error})", "write a JSON schema") from error
    return text


def _walk(value: Any) -> Iterator[tuple[int, Any, Any]]:
    """Each value in `value` with its depth and its key; iterative, so that depth costs nothing; one too deep ends it."""
    todo = [(1, None, value)]
    while todo:
        depth, key, value = todo.pop()
        yield depth, key, value
        if isinstance(value, dict):
            todo += [(depth + isinstance(v, dict | list), k, v) for k, v in value.items()]
        elif isinstance(value, list):
            todo += [(depth + 1, None, v) for v in value if isinstance(v, dict | list)]


def with_options(schema: Mapping[str, Any], lenient: bool = False) -> dict[str, Any]:
    """The schema as llguidance reads it. `lenient`: keywords that it cannot enforce are left to the model."""
    return {**schema, OURS: {"whitespace_pattern": BLANKS, "lenient": lenient}}


def json_rule(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """One JSON value as part of a grammar."""
    return f"%json {json.dumps(with_options(schema, lenient))}"


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of one JSON value."""
    return json.dumps({"grammars": [{"json_schema": with_options(schema)}]})


def lark_grammar(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def mask_of(grammar: str, tokenizer: Any, ends: Sequence[int] | None = None) -> Mask:
    """Compiled, or found compiled. Refusal where it cannot be, or not in time."""
    return _of(tokenizer, ends).mask(grammar)


def begin(tokenizer: Any, ends: Sequence[int] | None = None) -> None:
    """Start what compiles grammars, and try one that is often asked for, so that the first request need not wait for it.
    Nothing where this tokenizer cannot be masked: who asks will be told.
    """
    with contextlib.suppress(Refusal, Busy):
        mask_for({"type": "json_object"}, tokenizer, ends)


def marker_of(text: str, tokenizer: Any, ends: Sequence[int] | None = None) -> str:
    """`text` in a grammar: as the token that it is where the tokenizer has one for it, else letter by letter."""
    token = tokenizer.get_added_vocab().get(text)
    if token is not None and _of(tokenizer, ends).tokens.is_special_token(token):
        return f"<[{token}]>"
    return json.dumps(text)


class _Trial:
    """The process that tries grammars; started by `begin` or when first needed, and again where it was ended."""

    def __init__(self, tokenizer_json: str, ends: Sequence[int]):
        self._start = {"tokenizer": tokenizer_json, "ends": list(ends), "limit_s": COMPILE_S / 2}
        self._process: subprocess.Popen[str] | None = None

    def fault(self, grammar: str) -> str | None:
        """What is wrong with it, in one line. Raises `Busy` where nobody can say."""
        fresh = self._process is None
        process = self._process or self._begin()
        with contextlib.suppress(BrokenPipeError):
            self._write(process, {"grammar": grammar})
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], (START_S if fresh else 0) + COMPILE_S)[0]
        line = process.stdout.readline() if ready else ""
        if not line:
            self.end()
            raise Busy("what compiles schemas has ended or does not answer; it is started anew", "server", 2)
        return json.loads(line)["fault"]  # type: ignore[no-any-return]

    def _begin(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", compiling.__file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._write(self._process, self._start)
        return self._process

    def _write(self, process: subprocess.Popen[str], message: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class _Grammars:
    """One tokenizer's compiled grammars, those used last kept."""

    def __init__(self, tokenizer: Any, ends: Sequence[int]):
        backend = _backend(tokenizer)
        self.tokens = _tokens(backend, ends)
        self.vocab = self.tokens.vocab_size
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._trial = _Trial(backend, ends)
        self._trying = threading.Lock()
        weakref.finalize(self, self._trial.end)

    def mask(self, grammar: str) -> Mask:
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
        return Mask(self, grammar, kept.matcher if kept is not None else self._compile(grammar))

    def forget(self, grammar: str) -> None:
        with self._lock:
            self._kept.pop(grammar, None)

    @property
    def kept_bytes(self) -> int:
        return sum(kept.weight for kept in self._kept.values())

    @staticmethod
    def weight(grammar: str) -> int:
        """Bytes that a compiled one may take: 600 a character were the most seen."""
        return (64 << 10) + 600 * len(grammar)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        if not self._trying.acquire(timeout=WAIT_S):
            raise Busy("other schemas are being compiled", "server", 2)
        try:
            fault = self._trial.fault(grammar)
        finally:
            self._trying.release()
        if fault is None:
            matcher, fault = compiling.compile_grammar(self.tokens, grammar)
        if fault is not None:
            raise Refusal("E_SCHEMA", f"the schema cannot be used ({fault})", "simplify it")
        self._keep(grammar, matcher)
        return matcher

    def _keep(self, grammar: str, matcher: llguidance.LLMatcher) -> None:
        with self._lock:
            self._kept[grammar] = _Kept(matcher, self.weight(grammar))
            while self.kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)


class _Kept(NamedTuple):
    matcher: llguidance.LLMatcher
    weight: int


def _backend(tokenizer: Any) -> str:
    """The tokenizer as JSON."""
    if not getattr(tokenizer, "is_fast", False):
        raise Refusal("E_SCHEMA", "this model's tokenizer is none of the tokenizers library's", "ask for plain text")
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str()  # type: ignore[no-any-return]


def _tokens(backend: str, ends: Sequence[int]) -> llguidance.LLTokenizer:
    try:
        return compiling.tokens_of(backend, ends)
    except Exception as error:
        why = " ".join(str(error).split())[:160]
        raise Refusal("E_SCHEMA", f"this model's tokenizer cannot be masked ({why})", "ask for plain text") from error


_GRAMMARS: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], _Grammars]] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def _of(tokenizer: Any, ends: Sequence[int] | None) -> _Grammars:
    """The tokenizer's grammars: they live as long as it does."""
    key = tuple(sorted(set(ends))) if ends else (tokenizer.eos_token_id,)
    with _MAKING:
        mine = _GRAMMARS.setdefault(tokenizer, {})
        if key not in mine:
            mine[key] = _Grammars(tokenizer, key)
        return mine[key]
