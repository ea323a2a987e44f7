"""What a request may say: the fields of OpenAI's API that this server heeds, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

LEAST_TEMPERATURE = 0.01  # below it logits divided by it may overflow
Text = Annotated[str, Field(min_length=1, max_length=1000)]
T = TypeVar("T")


def _only(allowed: Any, why: str) -> AfterValidator:
    """A field of the API that may be given as long as it changes nothing."""

    def check(value: Any) -> Any:
        if value is None or value == allowed:
            return value
        raise PydanticCustomError(
            "unsupported", "must be {allowed}: {why}", {"allowed": json.dumps(allowed), "why": why}
        )

    return AfterValidator(check)


def _empty(why: str) -> AfterValidator:
    """A field that clients send back as they got it, as long as it says nothing."""

    def check(value: Any) -> Any:
        if value is None or value in ("", [], {}):
            return value
        raise PydanticCustomError("unsupported", "must be null or empty: {why}", {"why": why})

    return AfterValidator(check)


def _temperature(value: float | None) -> float | None:
    if value is None or value == 0 or value >= LEAST_TEMPERATURE:
        return value
    raise PydanticCustomError(
        "temperature", "must be 0, which takes the likeliest token, or from {least} to 2", {"least": LEAST_TEMPERATURE}
    )


class Strict(BaseModel):
    """Types as they are written, and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool = False


class Request(Strict):
    """What both kinds of requests have; a field that is null is as if it were left out."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks, for the client's own books
    n: Annotated[int | None, _only(1, "there is one answer a request")] = None
    frequency_penalty: Annotated[float | None, _only(0, "penalties are not supported")] = None
    presence_penalty: Annotated[float | None, _only(0, "penalties are not supported")] = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: Annotated[Any, _empty("templates know roles and no names")] = None
    refusal: Annotated[Any, _empty("refusals are not supported; send their text as content")] = None
    annotations: Annotated[Any, _empty("annotations are not supported")] = None
    audio: Annotated[Any, _empty("sound is not supported")] = None
    function_call: Annotated[Any, _empty("tools are not supported")] = None
    tool_calls: Annotated[Any, _empty("tools are not supported")] = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Request):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[bool | None, _only(False, "log probabilities are not supported")] = None


class CompletionRequest(Request):
    """Of `/v1/completions`."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    echo: Annotated[bool | None, _only(False, "the prompt is not sent back")] = None
    best_of: Annotated[int | None, _only(1, "there is one answer a request")] = None
    logprobs: Annotated[int | None, _only(None, "log probabilities are not supported")] = None


def where_and_why(errors: list[Any]) -> tuple[str | None, str]:
    """The field that one of pydantic's errors is about, as the API writes it, and a sentence on it."""
    error = next((each for each in errors if not each["type"].endswith("_type")), errors[0])  # the nearest of a union
    place = [] if error["type"] == "json_invalid" else [part for part in error["loc"] if part != "body"]
    named = [str(part) for part in place if isinstance(part, int) or str(part).isidentifier()]
    param = ".".join(part for part in named if part not in _KINDS) or None
    reason = _REASONS.get(error["type"], lambda e: e["msg"])(error)
    return param, reason if param is None else f"{param[:100]}: {reason}"


_KINDS = ("str", "int", "float", "bool")  # how pydantic names the types of a union
_REASONS: dict[str, Callable[[Any], str]] = {
    "extra_forbidden": lambda e: "this server has no such field; leave it out.",
    "missing": lambda e: "the field is required.",
    "json_invalid": lambda e: f"the body is no JSON: {e.get('ctx', {}).get('error', 'it cannot be read')}.",
}
