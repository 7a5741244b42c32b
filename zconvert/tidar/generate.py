"""`model.generate` by TiDAR: the entry point that transformers loads from a checkpoint's `custom_generate` folder.

transformers passes on whatever the caller gave to `model.generate`. What cannot be honoured here is refused by name: an
option that is silently dropped would change the distribution of the text.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from .acceptance import Sampling
from .decoding import DecodePlan, decode
from .model import LayoutModel
from .settings import TidarSettings

SAMPLERS = ("lossless", "mixed", "ar")
DEFAULT_MIX_WEIGHT = 0.5

_DEFAULT_NEW_TOKENS = 20
_DEFAULT_TOP_K = 50  # what transformers samples with where nothing is said
_LAYOUT_MODEL = "_tidar_layout_model"
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
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
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
    "repetition_penalty": (1,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "token_healing": (),
    "top_h": (),
    "typical_p": (1,),
    "use_mtp": (),
    "watermarking_config": (),
}


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    stopping_criteria: Any = None,
    streamer: Any = None,
    seed: int | None = None,
    sampler: str = "lossless",
    mix_weight: float | None = None,
    proposals: tuple[int, ...] | list[int] | None = None,
    block_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """Generates text as `model.generate` of transformers does, a block of tokens at a time.

    The rows of a batch are decoded one after another.

    Args:
        inputs: (R, N) prompt ids, padded on the left; also as `input_ids`. None: a lone BOS token.
        generation_config: as in transformers; what it leaves open comes from `model.generation_config`.
        model: of a converted checkpoint.
        input_ids: another name for `inputs`.
        attention_mask: (R, N), 0 at the padding.
        stopping_criteria: asked after each token of a forward; the text is cut where they stop it.
        streamer: gets the prompt, then the tokens of each forward. One row only.
        seed: of the random numbers; None goes on with torch's global ones.
        sampler: lossless (distributed as autoregressive sampling), mixed, or ar (one token a forward).
        mix_weight: of `mixed`: share of the autoregressive logits in what drafts are verified against.
        proposals: accepted counts that get a block of mask slots; None: the checkpoint's.
        block_size: tokens a forward can yield at most; None: the checkpoint's.
        **kwargs: fields of GenerationConfig: max_new_tokens, max_length, do_sample, temperature, top_k, top_p,
            eos_token_id, pad_token_id, num_return_sequences, return_dict_in_generate.

    Returns:
        (R, up to N + max_new_tokens) ids, the prompt included, padded on the right; or, with return_dict_in_generate,
        an output with these as `sequences`.

    Raises:
        ValueError: an option or input that cannot be honoured.
    """
    settings = settings_of(model)
    config, others = _merged_config(model, generation_config, kwargs)
    _refuse_unsupported(config, others, settings)
    ids, attention_mask = _prompt_ids(inputs, input_ids, attention_mask, config)
    eos = token_ids(config.eos_token_id)
    pad = config.pad_token_id
    if pad is None:
        pad = min(eos) if eos else settings.mask_token_id  # never part of a text
    if attention_mask is None:
        attention_mask = _mask_of_left_padding(ids, int(pad), eos)
    rows, padding = _unpadded(ids, attention_mask)
    sampling = _sampling(config)
    plan = plan_of(
        settings, sampling, eos, sampler=sampler, mix_weight=mix_weight, proposals=proposals, block_size=block_size
    )
    repeats = config.num_return_sequences or 1  # more than 1 without sampling is refused by GenerationConfig.update
    if streamer is not None and len(rows) * repeats > 1:
        raise ValueError("a streamer takes one row of text: give one prompt and num_return_sequences=1")

    budget = _new_tokens(config, ids.shape[1])
    criteria = StoppingCriteriaList(stopping_criteria or [])
    layout_model = layout_model_of(model)
    generator = None if seed is None else torch.Generator(layout_model.device).manual_seed(seed)
    texts: list[list[int]] = []
    for prompt, pads in zip(rows, padding, strict=True):
        for _ in range(repeats):
            texts.append(
                pads + prompt + _continue(layout_model, prompt, pads, plan, budget, generator, criteria, streamer)
            )
    if streamer is not None:
        streamer.end()
    width = max(map(len, texts))
    sequences = torch.tensor([text + [int(pad)] * (width - len(text)) for text in texts], device=ids.device)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]  # a plain LongTensor
    return sequences


def plan_of(
    settings: TidarSettings,
    sampling: Sampling,
    eos_token_ids: frozenset[int],
    *,
    sampler: str = "lossless",
    mix_weight: float | None = None,
    proposals: tuple[int, ...] | list[int] | None = None,
    block_size: int | None = None,
) -> DecodePlan:
    """The decoding that a sampler's name and its options stand for.

    Args:
        settings: of the checkpoint.
        sampling: temperature and cut-offs; its own mix_weight is replaced.
        eos_token_ids: tokens that end the text.
        sampler: lossless, mixed or ar.
        mix_weight: of `mixed` only; 0.5 where None.
        proposals: accepted counts that get a block of mask slots; None: the checkpoint's.
        block_size: tokens a forward can yield at most; None: the checkpoint's.

    Raises:
        ValueError: an unknown sampler, an option the sampler does not have, or one out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if mix_weight is not None and sampler != "mixed":
        raise ValueError(f"mix_weight is {mix_weight} with sampler {sampler!r}: only 'mixed' has one")
    weight = 1.0 if sampler != "mixed" else DEFAULT_MIX_WEIGHT if mix_weight is None else mix_weight
    sampling = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, weight)
    if sampler == "ar":
        if proposals is not None or block_size is not None:
            raise ValueError("proposals and block_size have no meaning with sampler 'ar': it drafts nothing")
        return DecodePlan.autoregressive(settings.mask_token_id, sampling, eos_token_ids)
    counts = None if proposals is None else tuple(proposals)
    return DecodePlan.tidar(settings, sampling, eos_token_ids, proposals=counts, block_size=block_size)


def settings_of(model: Any) -> TidarSettings:
    """The settings of a model loaded from a converted checkpoint.

    Raises:
        ValueError: its config has no `tidar` section, or one that cannot be used.
    """
    section = getattr(model.config, "tidar", None)
    if not isinstance(section, dict):
        raise ValueError("the model's config has no tidar section: it was not loaded from a converted checkpoint")
    return TidarSettings.from_dict(section)


def layout_model_of(model: Any) -> LayoutModel:
    """The model's LayoutModel, made once and kept on it."""
    kept = model.__dict__.get(_LAYOUT_MODEL)
    # A deep copy of the model carries a copy of the attribute along; one of another model is none of ours.
    if kept is None or kept.model is not model:
        kept = LayoutModel(model)
        setattr(model, _LAYOUT_MODEL, kept)
    return kept


def token_ids(value: int | list[int] | Tensor | None) -> frozenset[int]:
    """The ids in an `eos_token_id`, whatever its form.

    >>> sorted(token_ids([2, 1]))
    [1, 2]
    """
    if value is None:
        return frozenset()
    flat = torch.as_tensor(value).flatten().tolist()
    return frozenset(int(i) for i in flat if i >= 0)


def _continue(
    model: LayoutModel,
    prompt: list[int],
    pads: list[int],
    plan: DecodePlan,
    budget: int,
    generator: torch.Generator | None,
    criteria: StoppingCriteriaList,
    streamer: Any,
) -> list[int]:
    new: list[int] = []
    if streamer is not None:
        streamer.put(torch.tensor([pads + prompt]))
    for step in decode(model, prompt, plan, budget, generator):
        tokens, stopped = list(step.tokens), False
        if criteria:
            before = pads + prompt + new
            for count in range(1, len(tokens) + 1):
                text = torch.tensor([before + tokens[:count]], device=model.device)
                if bool(torch.as_tensor(criteria(text, None)).all()):
                    tokens, stopped = tokens[:count], True
                    break
        new += tokens
        if streamer is not None:
            streamer.put(torch.tensor(tokens))
        if stopped:
            break
    return new


def _merged_config(
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


def _refuse_unsupported(config: GenerationConfig, others: dict[str, Any], settings: TidarSettings) -> None:
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


def _prompt_ids(
    inputs: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None, config: GenerationConfig
) -> tuple[Tensor, Tensor | None]:
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


def _mask_of_left_padding(ids: Tensor, pad: int, eos: frozenset[int]) -> Tensor:
    """As transformers: leading pad tokens are padding, unless the pad token is one that ends texts."""
    if pad in eos:
        return torch.ones_like(ids)
    return (ids != pad).long().cummax(-1).values


def _unpadded(ids: Tensor, attention_mask: Tensor) -> tuple[list[list[int]], list[list[int]]]:
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


def _sampling(config: GenerationConfig) -> Sampling:
    if not config.do_sample:
        return Sampling()
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=_DEFAULT_TOP_K if config.top_k is None else config.top_k,
        top_p=1.0 if config.top_p is None else config.top_p,
    )


def _new_tokens(config: GenerationConfig, prompt_length: int) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return _DEFAULT_NEW_TOKENS
    if config.max_length <= prompt_length:
        raise ValueError(f"max_length is {config.max_length}, the prompt has {prompt_length} tokens: leave room")
    return config.max_length - prompt_length
