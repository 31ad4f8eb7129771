"""What a request to /v1/responses may hold, and the same as chat has it. Knows fields and numbers; knows no models.

Stateless: nothing is stored, nothing stored can be named. A conversation comes whole, calls and their results as items.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints

from duoserve.api.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Function,
    Positive,
    Schema,
    StreamOptions,
    Strict,
    Temperature,
    TextFormat,
    TextPart,
    User,
)

Id = Annotated[str, StringConstraints(max_length=256)]
LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete"]


class OutputPart(TextPart):
    """A part of a former answer, sent back as it came."""

    neutral: ClassVar[dict[str, Any]] = {"annotations": ([],)}
    logprobs: list[dict[str, Any]] | None = None  # of no use to us


Parts = str | Annotated[list[OutputPart], Field(min_length=1, max_length=MAX_MESSAGES)]


def text_of(parts: str | list[OutputPart]) -> str:
    return parts if isinstance(parts, str) else "\n".join(part.text for part in parts)


class InputMessage(Strict):
    neutral: ClassVar[dict[str, Any]] = {"phase": ()}
    type: Literal["message"] = "message"
    id: Id | None = None  # of a former answer, sent back with it
    status: Status | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts


class FunctionCall(Strict):
    """A call of a former answer."""

    neutral: ClassVar[dict[str, Any]] = {"namespace": (), "caller": ()}
    type: Literal["function_call"]
    id: Id | None = None
    status: Status | None = None
    call_id: Id
    name: str
    arguments: str


class FunctionCallOutput(Strict):
    """Its result."""

    neutral: ClassVar[dict[str, Any]] = {"namespace": (), "caller": (), "name": ()}
    type: Literal["function_call_output"]
    id: Id | None = None
    status: Status | None = None
    call_id: Id
    output: Parts


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """What a former answer thought before it spoke or called."""

    neutral: ClassVar[dict[str, Any]] = {"encrypted_content": (), "summary": ([],)}
    type: Literal["reasoning"]
    id: Id | None = None
    status: Status | None = None
    content: Annotated[list[ReasoningText], Field(max_length=MAX_MESSAGES)] | None = None


class FlatSchemaFormat(Schema):
    type: Literal["json_schema"]


class TextConfig(Strict):
    neutral: ClassVar[dict[str, Any]] = {"verbosity": ("medium",)}
    format: Annotated[TextFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None


class FlatTool(Function):
    neutral: ClassVar[dict[str, Any]] = {
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
        "async": (False,),
        "output_schema": (),
    }
    type: Literal["function"]


class FlatNamedTool(Strict):
    type: Literal["function"]
    name: str


def includable(names: list[str]) -> list[str]:
    for name in names:
        if name != LOGPROBS:
            raise ValueError(f"{name:.80} is not supported; ask for {LOGPROBS}")
    return names


class ResponsesRequest(Strict):
    neutral: ClassVar[dict[str, Any]] = {
        "store": (False,),
        "background": (False,),
        "previous_response_id": (),
        "conversation": (),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "reasoning": (),
        "prompt": (),
        "max_tool_calls": (),
        "safety_identifier": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
    }
    model: str = Field(max_length=1024)
    input: (
        str
        | Annotated[
            list[InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem],
            Field(min_length=1, max_length=MAX_MESSAGES),
        ]
    )
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Id], Field(max_length=16), AfterValidator(includable)] | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextConfig | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    user: User | None = None

    @property
    def logprobs(self) -> int | None:
        """Alternatives to report with each token; None for no logprobs."""
        return self.top_logprobs or 0 if self.include or self.top_logprobs else None


def messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """The instructions first, then the input, as chat has them: calls in a row are one message's, with what it said and
    thought just before."""
    found: list[dict[str, Any]] = []
    if asked.instructions:
        found.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*found, {"role": "user", "content": asked.input}]
    thought: str | None = None
    for item in asked.input:
        if isinstance(item, ReasoningItem):
            thought = "\n".join(part.text for part in item.content or ()) or thought
            continue
        if isinstance(item, FunctionCallOutput):
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
        elif isinstance(item, FunctionCall):
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": None})
            call = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
            found[-1].setdefault("tool_calls", []).append(call)
        else:
            role = "system" if item.role == "developer" else item.role
            found.append({"role": role, "content": text_of(item.content)})
        if thought is not None and found[-1]["role"] == "assistant":
            found[-1]["reasoning"], thought = thought, None
    return found


def answer_format(asked: ResponsesRequest) -> dict[str, Any] | None:
    """As chat's response_format has it."""
    if asked.text is None or asked.text.format is None:
        return None
    found = asked.text.format.model_dump(exclude_none=True, by_alias=True)
    kind = found.pop("type")
    return {"type": kind, "json_schema": found} if kind == "json_schema" else {"type": kind}


def chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A flat tool as chat has it."""
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def chat_choice(choice: Any) -> Any:
    return {"type": "function", "function": {"name": choice["name"]}} if isinstance(choice, dict) else choice
