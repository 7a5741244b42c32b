"""What the caller gave to `model.generate` -> prompts, sampling, length. What cannot be honoured is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

from .acceptance import Sampling
from .settings import TidarSettings

_DEFAULT_NEW_TOKENS = 20
_DEFAULT_TOP_K = 50  # what transformers samples with where nothing is said
# Options of transformers that change the text or the output in a way this loop has no counterpart for, with the values
# (besides None and False) that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "output_attentions": (),
    "output_hidden_states": (),
    "output_logits": (),
    "output_scores": (),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (),
    "sequence_bias": ({}, []),
    "token_healing": (),
    "top_h": (),
    "typical_p": (1,),
    "use_mtp": (),
    "watermarking_config": (),
}


def merged_config(
    model: Any, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Keyword arguments over the given config over the model's own; and the arguments that are no config field."""
    config = copy.deepcopy(model.generation_config if given is None else given)
    for name, value in model.generation_config.to_dict().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    # None asks for nothing: transformers passes every argument of `generate` on.
    others = config.update(**{name: value for name, value in kwargs.items() if value is not None})
    return config, others


def refuse_unsupported(config: GenerationConfig, others: dict[str, Any], settings: TidarSettings) -> None:
    """Raises a ValueError that names the options which would be dropped."""
    unsupported = {name: value for name, value in others.items() if value is not False}
    for name, neutral in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and value not in neutral:
            unsupported[name] = value
    suppressed = set(config.suppress_tokens or ()) - {settings.mask_token_id}  # the mask token never comes out anyway
    if suppressed:
        unsupported["suppress_tokens"] = sorted(suppressed)
    if unsupported:
        listed = ", ".join(
            f"{name}={value!r}" if isinstance(value, int | float | str | list) else name
            for name, value in sorted(unsupported.items())
        )
        raise ValueError(
            f"TiDAR decoding cannot honour {listed}: leave it out, set it to its neutral value where it comes from "
            "generation_config, or load the model without trust_remote_code"
        )


def checked_prompt(
    inputs: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None, config: GenerationConfig
) -> tuple[Tensor, Tensor | None]:
    """The prompt's (R, N) ids and its attention mask, of the shapes they should have."""
    if inputs is not None and input_ids is not None:
        raise ValueError("the prompt was given twice, as inputs and as input_ids")
    ids = inputs if inputs is not None else input_ids
    if ids is None:
        if config.bos_token_id is None:
            raise ValueError("there is no prompt: give input_ids (the model has no BOS token to start from)")
        return torch.tensor([[int(config.bos_token_id)]]), None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids is {shape}, expected token ids of shape (rows, tokens), at least one token")
    if attention_mask is not None and attention_mask.shape != ids.shape:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}, expected that of input_ids, {tuple(ids.shape)}")
    return ids, attention_mask


def mask_of_left_padding(ids: Tensor, pad: int, eos: frozenset[int]) -> Tensor:
    """As transformers: leading pad tokens are padding, unless the pad token is one that ends texts."""
    if pad in eos:
        return torch.ones_like(ids)
    return (ids != pad).long().cummax(-1).values


def unpadded(ids: Tensor, attention_mask: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """The rows' prompts, and the padding before each."""
    rows: list[list[int]] = []
    padding: list[list[int]] = []
    for row, mask in zip(ids.tolist(), (attention_mask != 0).tolist(), strict=True):
        start = mask.index(True) if True in mask else len(row)
        if start == len(row) or not all(mask[start:]):
            raise ValueError("each prompt needs a token, and padding stands on the left: set padding_side='left'")
        rows.append(row[start:])
        padding.append(row[:start])
    return rows, padding


def sampling_of(config: GenerationConfig) -> Sampling:
    """How transformers would choose tokens by this config."""
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=_DEFAULT_TOP_K if config.top_k is None else config.top_k,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=penalty,
    )


def new_token_budget(config: GenerationConfig, prompt_length: int) -> int:
    """How many tokens may follow a prompt of so many."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return _DEFAULT_NEW_TOKENS
    if config.max_length <= prompt_length:
        raise ValueError(f"max_length is {config.max_length}, the prompt has {prompt_length} tokens: leave room")
    return config.max_length - prompt_length


def all_criteria(given: Any, config: GenerationConfig, tokenizer: Any) -> StoppingCriteriaList:
    """The caller's stopping criteria, and those that the config asks for."""
    criteria = StoppingCriteriaList(given or [])
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass `tokenizer=` to generate")
        strings = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings)
        criteria.append(StopStringCriteria(tokenizer, strings))
    return criteria


def stop_by(criteria: StoppingCriteriaList, before: list[int], device: Any) -> Callable[[list[int]], int | None]:
    """A request's `stop`: the criteria are asked after each new token, as if each had come by a forward of its own."""
    asked = 0

    def stop(tokens: list[int]) -> int | None:
        nonlocal asked
        while asked < len(tokens):
            asked += 1
            text = torch.tensor([before + tokens[:asked]], device=device)
            if bool(torch.as_tensor(criteria(text, None)).all()):
                return asked
        return None

    return stop
