"""A transformers model seen through layouts: hidden states of a packed row or of a decoding forward, and logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .bigram import Bigrams
from .cache import TidarCache
from .families import Family, judge
from .gated import GatedWeights
from .grafts import graft
from .layout import Layout, PackedLayout, with_committed
from .masks import attention_masks
from .packed_attention import FLEX, SEGMENTS, packed_masks
from .positions import ARGUMENT as POSITIONS
from .positions import Positions
from .predecessors import Predecessors, predecessors_of
from .settings import GatedParts
from .sinks import ARGUMENT as IN_LAYOUT


class RowShard(Protocol):
    """What a forward over some columns of a row must know of the rest, which other processes have."""

    @property
    def key(self) -> Layout:
        """(R, K) the keys that attention gathers."""

    def masks(self, family: Family, config: Any, dtype: torch.dtype) -> Any:
        """The `attention_mask` argument of the forward."""

    def predecessors(self, past: int) -> Predecessors:
        """For convolutions that read `past` tokens of the past."""


class LayoutModel:
    """Runs a causal language model of transformers over layouts. Holds the model, owns nothing of it.

    The model itself stays usable as it was: without a layout every grafted layer is the stock one.
    """

    def __init__(self, model: Any) -> None:
        """Grafts what the model's family needs, in place.

        Args:
            model: a `…ForCausalLM` of a family in the family table, or a composite model around one.

        Raises:
            ValueError: the family cannot work; the message says why.
        """
        verdict = judge(model.config.to_dict())
        if verdict.family is None:
            raise ValueError(f"this model cannot decode by TiDAR: {verdict.reason}")
        self.model = model
        self.family: Family = verdict.family
        decoder = model.get_decoder()
        if hasattr(decoder, "lm_head"):  # Llama 4 has its causal language model for a decoder
            self._head, self._decoder = decoder.lm_head, decoder.model
        else:
            self._head, self._decoder = model.lm_head, decoder
        self.config = self._decoder.config
        self.gated: GatedWeights | None = None
        self.bigrams: Bigrams | None = None
        """which token follows which in the text that the checkpoint was trained on; drafting reads them"""
        self.layout: Layout | None = None
        """of the newest forward: hooks on modules read it to tell clean tokens and mask slots apart"""
        self._compiled: Callable[..., Any] | None = None
        graft(model, self.family)

    def compile(self, **options: Any) -> None:
        """Has torch compile the decoder for forwards of fixed shapes (`TidarCache.fix`); others run as before.

        The first such forwards take long: a shape is compiled by itself until torch has seen which of its sizes vary.

        Args:
            **options: of torch.compile; `mode="reduce-overhead"` adds CUDA graphs.
        """
        # One for each kind of forward, some twice; torch's own limit is 8, beyond which it silently stops compiling.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._compiled = torch.compile(self._decoder, **options)

    def add_gated(self, parts: GatedParts) -> GatedWeights:
        """Adds weights that act at mask slots only; at clean tokens the model stays what it is.

        Args:
            parts: which there shall be.

        Returns:
            the weights, to load or to train; new ones train from the source's own behaviour.
        """
        assert self.gated is None, "gated weights are added once"
        self.gated = GatedWeights(self._decoder, self._decoder.get_input_embeddings(), parts)
        return self.gated

    def hidden_states(
        self,
        input_ids: Tensor,
        layout: Layout,
        cache: TidarCache | None = None,
        key: Layout | None = None,
        shard: RowShard | None = None,
    ) -> Tensor:
        """One forward of the decoder, without the head.

        Args:
            input_ids: (R, N) int64, laid out as `layout` says.
            layout: of (R, N).
            cache: of a decoding; the forward's states are written behind its committed tokens.
            key: layout of all that the cache holds and of these tokens, (R, K); None: the cache's committed tokens.
            shard: where other processes have the rest of the rows; attention then gathers its keys itself.

        Returns:
            (R, N, hidden) after the final norm.
        """
        self.layout = layout
        fixed = cache is not None and cache.fixed is not None
        decoder = self._compiled if fixed and self._compiled is not None else self._decoder
        joined = key
        if shard is not None:
            key = shard.key
        elif key is None:
            key = layout
            if cache is not None and cache.get_seq_length():
                key = with_committed(layout, cache.lengths, cache.fixed)
        masks: Any
        if shard is not None:
            masks = shard.masks(self.family, self.config, self.model.dtype)
        elif isinstance(key, PackedLayout) and self.config._attn_implementation in (FLEX, SEGMENTS):
            masks = packed_masks(self.family, self.config, key, key.num_tokens - layout.num_tokens)
        else:
            uneven = fixed or (cache is not None and len(set(cache.lengths)) > 1)
            masks = attention_masks(self.family, self.config, layout, key, self.model.dtype, uneven=uneven)
        if self.family.mixing != "attention":
            name, past = _convolution_past(self.family, self.config)
            assert isinstance(masks, dict)
            if shard is not None:
                masks[name] = shard.predecessors(past)
            elif joined is None:
                masks[name] = predecessors_of(layout, past, cache)
            else:
                held = joined.num_tokens - layout.num_tokens
                masks[name] = dataclasses.replace(predecessors_of(joined, past, cache), past=past + held)
        options: dict[str, Any] = {}
        if self.family.positions:
            options[POSITIONS] = Positions(layout.position_ids, key.position_ids)
        if self.family.sinks:
            options[IN_LAYOUT] = True
        if self.gated is not None:
            self.gated.gate.first, self.gated.gate.length = layout.first_slot, layout.num_tokens
            input_ids = self.gated.with_rows(input_ids)
        try:
            outputs = decoder(
                input_ids=input_ids,
                attention_mask=masks,
                position_ids=layout.position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                **options,
            )
        finally:
            # With gradients, the backward pass may run layers again (activation checkpointing): see `release_gate`.
            if not torch.is_grad_enabled():
                self.release_gate()
        return outputs.last_hidden_state

    @property
    def compiled(self) -> bool:
        """Forwards of fixed shapes are compiled."""
        return self._compiled is not None

    @property
    def decoder(self) -> Any:
        """The stack of layers, without the head."""
        return self._decoder

    def release_gate(self) -> None:
        """Makes the plain model the source again after a forward with gradients, which leaves the gate as it was."""
        if self.gated is not None:
            self.gated.gate.first = None

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(…, hidden) -> (…, vocabulary) float32, as the model's own forward makes them."""
        if self.family.head == "inkling":
            hidden_states = hidden_states / self.config.logits_mup_width_multiplier
        return self.finish_logits(self._head(hidden_states).float())

    def finish_logits(self, logits: Tensor) -> Tensor:
        """What follows the output head: (…, rows of the head) float32 -> (…, vocabulary)."""
        config, head = self.config, self.family.head
        if head == "logits_scaling":
            return logits / config.logits_scaling
        if head == "logit_scale":
            return logits * config.logit_scale
        if head == "softcap" and config.final_logit_softcapping is not None:
            return torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        if head == "inkling" and config.unpadded_vocab_size is not None:
            return logits[..., : config.unpadded_vocab_size]
        return logits

    @property
    def linear_head(self) -> nn.Linear | None:
        """The output head, where `logits(h)` is `finish_logits(W h + b)` and nothing else; else None.

        It is not where the head is a class of its own (grafted, sharded, quantised) or its weight a distributed tensor.
        """
        head = self._head
        ordinary = type(head) is nn.Linear and type(head.weight) is nn.Parameter and self.family.head != "inkling"
        return head if ordinary else None

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        return self.model.get_input_embeddings().weight.device


def _convolution_past(family: Family, config: Any) -> tuple[str, int]:
    """Under which name a family's convolutions take their mask, and how many tokens of the past they read."""
    if family.mixing == "cca":
        return "conv", (config.cca_time0 - 1) + (config.cca_time1 - 1)  # two convolutions, one after the other
    if family.mixing == "lfm2":
        return "conv", config.conv_L_cache - 1
    return "linear_attention", max(config.sconv_kernel_size, config.conv_kernel_size) - 1
