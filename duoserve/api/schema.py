"""What a request may hold, with bounds checked before anything is computed. Knows fields and numbers; knows no models.

Fields that we cannot honour are refused by name. Those of OpenAI's whose documented default changes nothing may be sent with
that default, and with null.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from duoserve.api.errors import ApiError

MAX_DEPTH = 64
MAX_VALUES = 1_000_000
MAX_MESSAGES, MAX_TOOLS, MAX_N, MAX_PROMPTS = 4096, 128, 8, 128
MAX_SEED = 2**63 - 1
MAX_NUMBER = 2**31 - 1
LARGE = 256 << 10  # bytes of a body

T = TypeVar("T", bound="Strict")


def parse(body: bytes) -> Any:
    """JSON within bounds: depth, number of values, finite numbers, whole characters, names given once."""
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise _bad(f"the body holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(
            body, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once, parse_int=_integer
        )
    except RecursionError:
        raise _bad(f"the body is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:  # also no UTF-8
        raise _bad(f"the body is not JSON ({str(error)[:200]})") from None
    if _deeper(value, MAX_DEPTH):
        raise _bad(f"the body is nested deeper than {MAX_DEPTH}")
    if b"\\u" in body and not _whole(value):
        raise _bad("the body holds half of a surrogate pair")
    return value


def read(body: bytes, kind: type[T]) -> T:
    """A request of that kind, or ApiError 400 naming the field."""
    if len(body) > LARGE:
        _refuse_shape(body, kind)
    value = parse(body)
    if not isinstance(value, dict):
        raise _bad("the body is no JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _named(error) from None


def _refuse_shape(body: bytes, kind: type[T]) -> None:
    """A large body is read twice: a fifth of the time of strict reading says whether its shape is wrong."""
    try:
        value = from_json(body)
    except ValueError:
        return  # strict reading says why
    if isinstance(value, dict):
        try:
            kind.model_validate(value)
        except ValidationError as error:
            raise _named(error) from None


def _bad(message: str) -> ApiError:
    return ApiError(400, f"{message}; send one JSON object within the limits", code="invalid_json")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond what a number can be")
    return number


def _integer(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _deeper(value: Any, depth: int) -> bool:
    """A level at a time; what json makes is of these very types."""
    level = [value] if type(value) in (dict, list) else []
    for _ in range(depth):
        inside = [item.values() if type(item) is dict else item for item in level]
        level = [v for values in inside for v in values if type(v) is dict or type(v) is list]
        if not level:
            return False
    return True


def _whole(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(error: ValidationError) -> ApiError:
    """The first thing that is wrong; of a union's many, the one that came furthest."""
    found = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] in ("extra_forbidden", "missing"):
        found = first
    where = ".".join(str(part)[:80] for part in found["loc"] if not _tag(part)) or None
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: this field is not supported; leave it out", param=where, code="unsupported")
    if found["type"] == "missing":
        return ApiError(400, f"{where}: this field is required; add it", param=where, code="missing")
    message = found["msg"].removeprefix("Value error, ")[:300]
    return ApiError(400, f"{where}: {message}" if where else message, param=where, code="invalid_value")


def _tag(part: int | str) -> bool:
    """Pydantic names the member of a union where the caller wrote nothing."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "list", "dict") or part[:1].isupper())


class Strict(BaseModel):
    """Unknown fields, wrong types and numbers that are none are errors. `neutral`: what may be sent for a field we lack."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if not (k in cls.neutral and (v is None or _among(v, cls.neutral[k])))}


def _among(value: Any, known: tuple[Any, ...]) -> bool:
    return any(type(value) is type(k) and value == k for k in known)


Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Token = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
User = Annotated[str, StringConstraints(max_length=256)]


class StreamOptions(Strict):
    neutral = {"include_obfuscation": (False,)}
    include_usage: bool = False


class Sampled(Strict):
    """What chat and completions share. Beyond OpenAI's: top_k, min_p, repetition_penalty, ignore_eos."""

    model: str = Field(max_length=1024)
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_NUMBER)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None

    @model_validator(mode="after")
    def _streamed(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true; leave it out")
        for name in self.logit_bias or {}:
            if not (name.isascii() and name.isdigit() and len(name) <= 10):
                raise ValueError(f"logit_bias: {name[:40]!r} is no token id")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def biases(self) -> dict[int, float]:
        return {int(name): bias for name, bias in (self.logit_bias or {}).items()}

    @property
    def usage_streamed(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str


# Who speaks, among several of one role: OpenAI's bounds. Templates show it or do not.
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\s<|\\/>]+$")]
Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Strict):
    """Text only: parts with addresses of pictures or files are refused, nothing is ever fetched. Beyond OpenAI's: reasoning,
    ours and others' name for it, as a reply told it.
    """

    neutral = {"refusal": (), "audio": (), "function_call": (), "annotations": ([],), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _of_its_role(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not of role {self.role}")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("tool_call_id belongs to role tool, and to no other")
        if (self.reasoning is not None or self.reasoning_content is not None) and self.role != "assistant":
            raise ValueError(f"reasoning is the assistant's, not of role {self.role}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: this field is required; add it")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As `tools.prepare` reads messages."""
        found: dict[str, Any] = {"role": self.role}
        found["content"] = None if self.content is None else text_of(self.content)
        if self.tool_calls is not None:
            found["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if reasoning := self.reasoning or self.reasoning_content:
            found["reasoning"] = reasoning
        if self.name is not None and self.role != "tool":  # a result has its call's
            found["name"] = self.name
        return found | ({"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {})


def text_of(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class TextFormat(Strict):
    type: Literal["text", "json_object"]


class Schema(Strict):
    name: str = Field(max_length=256)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: Schema


Format = Annotated[TextFormat | SchemaFormat, Field(discriminator="type")]


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    neutral = {
        "store": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
        "functions": (),
        "function_call": (),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "web_search_options": (),
        "safety_identifier": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
    }
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    return_progress: bool = False  # llama.cpp's: see `progress`

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.return_progress and not self.stream:
            raise ValueError("return_progress is for stream: true; leave it out")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} differ"
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


# Of a hundred thousand wrong ones the first is enough.
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]


class CompletionRequest(Sampled):
    neutral = {"best_of": (1,), "suffix": ()}
    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_NUMBER)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 asks for nothing; say echo, or ask for at least 1")
        if len(self.prompts) * (self.n or 1) > MAX_PROMPTS:
            total = len(self.prompts) * (self.n or 1)
            raise ValueError(f"{total} choices are asked for, at most {MAX_PROMPTS} may be")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        asked = self.prompt
        if isinstance(asked, str):
            return [asked]
        return [asked] if isinstance(asked[0], int) else list(asked)  # type: ignore[list-item,arg-type]
