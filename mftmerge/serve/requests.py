"""What OpenAI's two endpoints take, as jobs for the engine: every field is done, harmless, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from mftmerge.chat import prompt_ids
from mftmerge.errors import BadInput
from mftmerge.serve.sampling import Sampling

# Fields that may be there and change nothing here: they say who asks, or how to bill and store it elsewhere.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options")
# Other fields that ask for nothing as long as they have these values.
IDLE: dict[str, tuple[object, ...]] = {
    "echo": (False, None),
    "best_of": (1, None),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
}
Ids = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    include_usage: bool = False
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None


class Part(BaseModel):
    """A part of a message's content: text only."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class TextRequest(_Request):
    """POST /v1/completions. A prompt is a text or token ids, or a list of prompts."""

    prompt: str | Ids | list[str] | list[Ids]
    logprobs: int | None = Field(None, ge=0, le=20)


@dataclass(frozen=True)
class Asked:
    """A request, checked. prompts: token ids; each gets `count` answers. chat: which of the two endpoints."""

    model: str
    prompts: list[list[int]]
    count: int
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    chat: bool


def parse(kind: type[_Request], body: Any) -> _Request:
    """A request from its JSON. Raises BadInput, which names the wrong field."""
    if not isinstance(body, dict):
        raise BadInput("the body must be a JSON object")
    given = {k: v for k, v in body.items() if k not in IGNORED}
    for name, idle in IDLE.items():
        if name in given and given.pop(name) not in idle:
            raise BadInput(f"{name}: is not supported by this server; leave it out")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or not all(isinstance(v, bool) for v in options.values()):
        raise BadInput("stream_options: should be like {'include_usage': true}")
    given["include_usage"] = options.get("include_usage", False)
    try:
        return kind.model_validate(given)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:100]
        unknown = first["type"] == "extra_forbidden"
        raise BadInput(
            f"{name}: {'is not supported by this server; leave it out' if unknown else first['msg']}"
        ) from None


def asked(request: _Request, tokenizer: PreTrainedTokenizerBase, most: int, vocabulary: int) -> Asked:
    """The request with its prompts as tokens. most: new tokens of an answer. Raises BadInput."""
    chat = isinstance(request, ChatRequest)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > 16 or any(not 0 < len(s) <= 1000 for s in stop):
        raise BadInput("stop: give up to 16 strings of 1 to 1000 characters")
    if wrong := [token for token in request.logit_bias or {} if not 0 <= token < vocabulary]:
        raise BadInput(f"logit_bias: there is no token {wrong[0]}")
    wanted = request.max_tokens
    if isinstance(request, ChatRequest):
        if wanted is not None and request.max_completion_tokens not in (None, wanted):
            raise BadInput("max_tokens and max_completion_tokens: give one of them")
        wanted = request.max_completion_tokens or wanted or most
        if request.top_logprobs is not None and not request.logprobs:
            raise BadInput("top_logprobs: needs logprobs to be true")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompts = [_chat(request.messages, tokenizer)]
    else:
        assert isinstance(request, TextRequest)
        wanted, logprobs = wanted or 16, request.logprobs
        prompts = [_text(p, tokenizer, vocabulary) for p in _listed(request.prompt)]
    if wanted > most:
        raise BadInput(f"max_tokens: {wanted} is more than the {most} of this server")
    sampling = Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias or {},
        logprobs=logprobs,
    )
    stream = bool(request.stream)
    return Asked(request.model, prompts, request.n or 1, wanted, sampling, stop, stream, request.include_usage, chat)


def _chat(messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput("messages: this model has no chat template; use /v1/completions")
    try:
        text = tokenizer.apply_chat_template([m.turn for m in messages], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as e:
        raise BadInput(f"messages: the model's chat template refuses them ({' '.join(str(e).split())[:200]})") from None
    return prompt_ids(tokenizer, str(text), special=False)


def _listed(prompt: Any) -> list[Any]:
    """A prompt or a list of prompts as a list of prompts."""
    if not prompt:
        raise BadInput("prompt: is empty")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _text(prompt: str | list[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    ids = prompt if isinstance(prompt, list) else prompt_ids(tokenizer, prompt, special=True)
    if not ids:
        raise BadInput("prompt: is empty")
    if max(ids) >= vocabulary:
        raise BadInput(f"prompt: there is no token {max(ids)}")
    return ids
