"""`model.generate` by TiDAR: the entry point that transformers loads from a checkpoint's `custom_generate` folder.

transformers passes on whatever the caller gave to `model.generate`. What cannot be honoured here is refused by name: an
option that is silently dropped would change the distribution of the text.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import cached_file

from ._requirements import OLDEST  # noqa: F401  # first of all
from .acceptance import Sampling
from .bigram import Bigrams
from .decoding import DecodePlan, Request, Result
from .engine import Engine
from .generate_options import (
    all_criteria,
    checked_prompt,
    mask_of_left_padding,
    merged_config,
    new_token_budget,
    refuse_unsupported,
    sampling_of,
    stop_by,
    unpadded,
)
from .model import LayoutModel
from .settings import BIGRAM_FILE, GATED_FILE, TidarSettings

SAMPLERS = ("lossless", "mixed", "ar")
MODES = ("single", "two")
DEFAULT_MIX_WEIGHT = 0.5

_LAYOUT_MODEL = "_tidar_layout_model"


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
    mode: str = "single",
    tokenizer: Any = None,
    **kwargs: Any,
) -> Any:
    """Generates text as `model.generate` of transformers does, a block of tokens at a time.

    Args:
        inputs: (R, N) prompt ids, padded on the left; also as `input_ids`. None: a lone BOS token.
        generation_config: as in transformers; what it leaves open comes from `model.generation_config`.
        model: of a converted checkpoint.
        input_ids: another name for `inputs`.
        attention_mask: (R, N), 0 at the padding.
        stopping_criteria: asked after each token of each text; the text is cut where they stop it.
        streamer: gets the prompt, then the tokens of each forward. One row only.
        seed: of the random numbers, row i having those of seed + i; None goes on with torch's global ones.
        sampler: lossless (distributed as autoregressive sampling), mixed, or ar (one token a forward).
        mix_weight: of `mixed`: share of the autoregressive logits in what drafts are verified against.
        proposals: accepted counts that get a block of mask slots; None: the checkpoint's.
        block_size: tokens a forward can yield at most; None: the checkpoint's.
        mode: single (a forward verifies and drafts) or two (forwards take turns).
        tokenizer: reads `stop_strings`.
        **kwargs: fields of GenerationConfig: max_new_tokens, max_length, max_time, do_sample, temperature, top_k,
            top_p, min_p, repetition_penalty, eos_token_id, pad_token_id, stop_strings, num_return_sequences,
            return_dict_in_generate.

    Returns:
        (R, up to N + max_new_tokens) ids, the prompt included, padded on the right; or, with return_dict_in_generate,
        an output with these as `sequences`.

    Raises:
        ValueError: an option or input that cannot be honoured.
    """
    settings = settings_of(model)
    config, others = merged_config(model, generation_config, kwargs)
    refuse_unsupported(config, others, settings)
    ids, attention_mask = checked_prompt(inputs, input_ids, attention_mask, config)
    eos = token_ids(config.eos_token_id)
    pad = config.pad_token_id
    if pad is None:
        pad = min(eos) if eos else settings.mask_token_id  # never part of a text
    if attention_mask is None:
        attention_mask = mask_of_left_padding(ids, int(pad), eos)
    rows, padding = unpadded(ids, attention_mask)
    sampling = sampling_of(config)
    plan = plan_of(
        settings,
        sampling,
        eos,
        sampler=sampler,
        mix_weight=mix_weight,
        proposals=proposals,
        block_size=block_size,
        mode=mode,
    )
    repeats = config.num_return_sequences or 1  # more than 1 without sampling is refused by GenerationConfig.update
    if streamer is not None and len(rows) * repeats > 1:
        raise ValueError("a streamer takes one row of text: give one prompt and num_return_sequences=1")
    criteria = all_criteria(stopping_criteria, config, tokenizer)

    budget = new_token_budget(config, ids.shape[1])
    layout_model = layout_model_of(model)
    engine = Engine(layout_model, plan, max_batch=len(rows) * repeats)
    results: list[Result] = []
    for prompt, pads in zip(rows, padding, strict=True):
        for _ in range(repeats):
            own_seed = None if seed is None else seed + len(results)
            stop = stop_by(criteria, pads + prompt, layout_model.device) if criteria else None
            results.append(engine.add(Request(prompt, budget, seed=own_seed, stop=stop)))
    if streamer is not None:
        streamer.put(ids)
    while not engine.idle:
        for _, step in engine.step():
            if streamer is not None:
                streamer.put(torch.tensor(step.tokens))
    if streamer is not None:
        streamer.end()
    texts = [padding[i // repeats] + result.request.prompt + result.tokens for i, result in enumerate(results)]
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
    mode: str = "single",
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
        mode: single or two; of ar, single.

    Raises:
        ValueError: an unknown sampler or mode, an option the sampler does not have, or one out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    if mix_weight is not None and sampler != "mixed":
        raise ValueError(f"mix_weight is {mix_weight} with sampler {sampler!r}: only 'mixed' has one")
    weight = 1.0 if sampler != "mixed" else DEFAULT_MIX_WEIGHT if mix_weight is None else mix_weight
    sampling = replace(sampling, mix_weight=weight)
    if sampler == "ar":
        if proposals is not None or block_size is not None or mode != "single":
            raise ValueError("proposals, block_size and mode have no meaning with sampler 'ar': it drafts nothing")
        return DecodePlan.autoregressive(settings.mask_token_id, sampling, eos_token_ids)
    counts = None if proposals is None else tuple(proposals)
    two = mode == "two"
    return DecodePlan.tidar(
        settings, sampling, eos_token_ids, proposals=counts, block_size=block_size, two_forwards=two
    )


def settings_of(model: Any) -> TidarSettings:
    """The settings of a model loaded from a converted checkpoint.

    Raises:
        ValueError: its config has no `tidar` section, or one that cannot be used.
    """
    section = getattr(model.config.get_text_config(), "tidar", None)
    if not isinstance(section, dict):
        raise ValueError("the model's config has no tidar section: it was not loaded from a converted checkpoint")
    return TidarSettings.from_dict(section)


def layout_model_of(model: Any) -> LayoutModel:
    """The model's LayoutModel, made once and kept on it."""
    kept = model.__dict__.get(_LAYOUT_MODEL)
    # A deep copy of the model carries a copy of the attribute along; one of another model is none of ours.
    if kept is None or kept.model is not model:
        kept = LayoutModel(model)
        section = getattr(model.config.get_text_config(), "tidar", None)
        if isinstance(section, dict) and section.get("mode") == "gated":
            add_gated(kept, TidarSettings.from_dict(section))
        if (path := _own_file(model.config, BIGRAM_FILE)) is not None:
            kept.bigrams = Bigrams(**load_file(path)).to(kept.device)
        setattr(model, _LAYOUT_MODEL, kept)
    return kept


def add_gated(layout_model: LayoutModel, settings: TidarSettings) -> None:
    """Adds a checkpoint's gated weights to its model; those of a checkpoint that was not trained yet are new."""
    assert settings.gated is not None
    model = layout_model.model
    weights = layout_model.add_gated(settings.gated)
    path = _own_file(model.config, GATED_FILE)
    if path is not None:
        weights.load_state_dict(load_file(path))
    elif settings.stages:
        raise ValueError(f"the checkpoint lacks {GATED_FILE}, the weights that {', '.join(settings.stages)} trained")
    weights.place(model.dtype)


def _own_file(config: Any, file: str) -> str | None:
    """Where a file of ours lies in the checkpoint that a model was loaded from; None where it has none."""
    name = str(getattr(config, "_name_or_path", ""))
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.exists(path) else None
    if not name or not isinstance(getattr(config.get_text_config(), "tidar", None), dict):
        return None  # no checkpoint of ours: nothing is asked of the Hub
    options: dict[str, Any] = {"revision": _commit(config), "_raise_exceptions_for_missing_entries": False}
    return cached_file(name, file, **options)


def _commit(config: Any) -> str | None:
    """The commit that a model of the Hub was loaded from: newer transformers tell it only by where this file lies."""
    folder = os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return getattr(config, "_commit_hash", None) or (folder if re.fullmatch(r"[0-9a-f]{40}", folder) else None)


def token_ids(value: int | list[int] | Tensor | None) -> frozenset[int]:
    """The ids in an `eos_token_id`, whatever its form.

    >>> sorted(token_ids([2, 1]))
    [1, 2]
    """
    if value is None:
        return frozenset()
    flat = torch.as_tensor(value).flatten().tolist()
    return frozenset(int(i) for i in flat if i >= 0)
