"""A checked request -> the engine's own, with the checkpoint's tokenizer, chat template and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zconvert.checkpoint.load import prompt_ids
from zconvert.data.chat import asking_ids
from zconvert.errors import UserError
from zconvert.serving.protocol import MOST_NAME, ApiError, Asked, Chat, Completion
from zconvert.serving.text import GrowingText
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.generate import DEFAULT_MIX_WEIGHT


@dataclass(frozen=True)
class Served:
    """The checkpoint that is served.

    Args:
        name: what clients call it.
        tokenizer: its own.
        plan: of the engine; its mix_weight is that of requests which name no sampler.
        context: tokens of a prompt and its text together, at most.
        vocabulary: ids that a prompt can have are below it.
    """

    name: str
    tokenizer: Any
    plan: DecodePlan
    context: int
    vocabulary: int


def encode(asked: Asked, served: Served) -> list[tuple[Request, GrowingText]]:
    """The texts that a request asks for, choice by choice.

    Raises:
        ApiError: the checkpoint cannot do what is asked.
    """
    if asked.model != served.name:
        raise unknown_model(asked.model, served)
    sampling = sampling_of(asked, served.plan)
    texts: list[tuple[Request, GrowingText]] = []
    for prompt in _prompts(asked, served):
        new_tokens = _new_tokens(asked, len(prompt), served.context)
        for _ in range(asked.n or 1):
            request = Request(prompt, new_tokens, sampling, seed=asked.seed_of(len(texts)))
            texts.append((request, GrowingText(served.tokenizer, prompt, asked.stop)))
    return texts


def unknown_model(name: str, served: Served) -> ApiError:
    """The error of a request for a model that is not here."""
    message = f"there is no model {name[:MOST_NAME]!r} here, only {served.name!r}"
    return ApiError(message, status=404, param="model", code="model_not_found")


def sampling_of(asked: Asked, plan: DecodePlan) -> Sampling:
    """How a request's tokens are chosen.

    Raises:
        ApiError: its sampler is not what the server's engine does.
    """
    drafts = bool(plan.proposals)
    weight = plan.sampling.mix_weight
    if asked.sampler == "ar" and drafts:
        raise _no_sampler("this server drafts, and the sampler 'lossless' has the distribution of 'ar'")
    if asked.sampler == "mixed" or (asked.sampler is None and asked.mix_weight is not None):
        if not drafts:
            raise _no_sampler("this server decodes one token a forward: there is nothing to mix")
        own = weight if weight < 1 else DEFAULT_MIX_WEIGHT
        weight = own if asked.mix_weight is None else asked.mix_weight
    elif asked.sampler is not None:
        weight = 1.0
    return Sampling(
        temperature=asked.heat,
        top_k=asked.top_k or 0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        mix_weight=weight,
        min_p=asked.min_p or 0.0,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
    )


def _no_sampler(reason: str) -> ApiError:
    return ApiError(reason, param="sampler", code="unsupported_parameter")


def _prompts(asked: Asked, served: Served) -> list[list[int]]:
    """Token ids of the prompts."""
    try:
        if isinstance(asked, Chat):
            return [asking_ids(asked.conversation, served.tokenizer)]
        assert isinstance(asked, Completion)
        return [
            prompt_ids(served.tokenizer, prompt) if isinstance(prompt, str) else _checked(prompt, served)
            for prompt in asked.prompt
        ]
    except UserError as error:
        found = f": {error.found}" if error.found else ""
        raise ApiError(f"{error.what}{found}", param=asked.prompt_param, code="invalid_value") from None


def _checked(prompt: list[int], served: Served) -> list[int]:
    if wrong := [i for i in prompt if i >= served.vocabulary or i == served.plan.mask_token_id]:
        raise ApiError(f"prompt has token {wrong[0]}, which no text has", param="prompt", code="invalid_value")
    return prompt


def _new_tokens(asked: Asked, prompt: int, context: int) -> int:
    """Tokens that may follow a prompt of so many."""
    room = context - prompt
    wanted = asked.new_tokens
    if room < 1 or (wanted is not None and wanted > room):
        asks = "" if wanted is None else f", and {wanted} more are asked for"
        raise ApiError(
            f"the context has {context} tokens: the prompt takes {prompt}{asks}",
            param=asked.prompt_param,
            code="context_length_exceeded",
        )
    return room if wanted is None else wanted
