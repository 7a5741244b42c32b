"""What a client sends -> a checked request, or an error in the API's own shape. Pure: bytes in, dataclasses out.

The API is OpenAI's: `/v1/completions` and `/v1/chat/completions`, with fields of our own for what it cannot say. What
cannot be honoured is refused by name, unless it asks for nothing.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import from_json

MAX_BODY = 16 * 2**20
"""bytes of a request"""

_MAX_CHOICES = 128
_MAX_STOPS = 16
_MOST_FIELDS = 100
"""of an object: pydantic would list every unknown one, in seconds and gigabytes where there are a million"""
MOST_NAME = 200
"""characters of a name in an answer; one of megabytes is not compared with others either"""
# A temperature below this is greedy in all but name, and dividing by it would overflow.
_GREEDY_BELOW = 1e-4

# Fields that change no text here.
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",  # tools themselves are refused
        "prediction",  # a hint at speed
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Fields that are not offered, with the values besides null that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """An answer that is an error, as OpenAI's API tells it.

    Args:
        message: for people.
        status: of HTTP.
        param: the field that is wrong.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _read_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"expected a string, or a list of at most {_MAX_STOPS}, none empty")
    return tuple(stops)


def _read_prompts(value: Any) -> Any:
    """A text, token ids, or a list of either -> a list."""
    prompts = value if isinstance(value, list) and not all(_is_token(item) for item in value) else [value]
    if not prompts or not all(isinstance(prompt, str) or _are_tokens(prompt) for prompt in prompts):
        raise ValueError("expected a string, a list of token ids, or a list of such, none of the latter empty")
    return tuple(prompts)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_token(item) for item in value)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_content(value: Any) -> Any:
    """Text, or its parts in a list."""
    if value is None or isinstance(value, str):
        return value
    texts = [_read_part(part) for part in value] if isinstance(value, list) else [None]
    if any(text is None for text in texts):
        raise ValueError('expected text, or a list of {"type": "text", "text": …}: images and sound are not read')
    return "".join(map(str, texts))


def _read_part(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise ValueError(f"fields: expected at most {_MOST_FIELDS}, found {len(value):,}")
        return value


class StreamOptions(_Body):
    """Of a request with `stream`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """padding against listeners; there is none"""


class Asked(_Body):
    """What requests of both kinds may say. None: left open."""

    chat: ClassVar[bool]
    prompt_param: ClassVar[str]
    """the field that has the prompt"""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stops)] = ()

    # Not OpenAI's.
    sampler: Literal["lossless", "mixed", "ar"] | None = None
    mix_weight: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)

    @model_validator(mode="after")
    def _options_go_together(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        if self.mix_weight is not None and self.sampler not in ("mixed", None):
            raise ValueError("mix_weight: only sampler 'mixed' has one")
        return self

    @property
    def new_tokens(self) -> int | None:
        """Tokens that are asked for at most."""
        return self.max_tokens

    @property
    def choices(self) -> int:
        """Texts that are asked for."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """The stream ends with the tokens used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def heat(self) -> float:
        """The temperature; 0 is greedy."""
        wanted = 1.0 if self.temperature is None else self.temperature
        return wanted if wanted >= _GREEDY_BELOW else 0.0

    def seed_of(self, choice: int) -> int | None:
        """The seed of a choice's own random numbers."""
        return None if self.seed is None else (self.seed + choice) % 2**63


class Completion(Asked):
    """A request to `/v1/completions`."""

    chat = False
    prompt_param = "prompt"

    prompt: Annotated[tuple[str | list[int], ...], BeforeValidator(_read_prompts)]

    @property
    def new_tokens(self) -> int:
        """Tokens that are asked for at most; OpenAI's default is short."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def choices(self) -> int:
        """Texts that are asked for."""
        return len(self.prompt) * (self.n or 1)


class Message(_Body):
    """Of a conversation."""

    role: str = Field(min_length=1)
    content: Annotated[str | None, BeforeValidator(_read_content)] = None
    name: str | None = None


class Chat(Asked):
    """A request to `/v1/chat/completions`."""

    chat = True
    prompt_param = "messages"

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def new_tokens(self) -> int | None:
        """Tokens that are asked for at most; None: what the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates read them."""
        return [message.model_dump(exclude_none=True) for message in self.messages]


AskedT = TypeVar("AskedT", bound=Asked)


def parse(body: bytes | dict[str, Any], kind: type[AskedT]) -> AskedT:
    """Reads a request.

    Args:
        body: JSON text, or what it says.
        kind: Completion or Chat.

    Raises:
        ApiError: what is wrong with it, at its first wrong field.

    >>> parse(b'{"model": "m", "prompt": "Once", "n": 0}', Completion)
    Traceback (most recent call last):
    zconvert.serving.protocol.ApiError: n is 0: expected greater than or equal to 1
    """
    fields: Any = body
    if isinstance(body, bytes):
        try:
            fields = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError("the body is not a JSON object", code="invalid_json")
    wanted = {}
    for name, value in fields.items():
        if name in _IGNORED:
            continue
        if name in _REFUSED:
            if value is not None and not any(value == neutral for neutral in _REFUSED[name]):
                raise ApiError(f"{name} is not supported", param=name, code="unsupported_parameter")
            continue
        wanted[name] = value
    try:
        return kind.model_validate(wanted)
    except ValidationError as error:
        raise _wrong(error, kind) from None


def _wrong(error: ValidationError, kind: type[Asked]) -> ApiError:
    """The first of pydantic's findings, in the API's words."""
    item = error.errors(include_url=False)[0]
    param = ".".join(map(str, item["loc"]))[:MOST_NAME]
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, list(kind.model_fields), n=1) if len(item["loc"]) == 1 else []
        hint = f", did you mean {near[0]}?" if near else ""
        return ApiError(f"{param} is not a field of the request{hint}", param=param, code="unknown_parameter")
    if item["type"] == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
    reason = str(item["ctx"]["error"]) if item["type"] == "value_error" else str(item["msg"])
    if not param:  # two fields that do not go together
        return ApiError(reason, param=reason.split(":")[0], code="invalid_value")
    found = repr(item["input"])
    found = found if len(found) <= 60 else f"{found[:57]}…"
    return ApiError(
        f"{param} is {found}: {reason.replace('Input should be', 'expected')}", param=param, code="invalid_value"
    )
