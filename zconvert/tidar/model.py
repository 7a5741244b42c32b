"""A transformers model seen through layouts: hidden states of a packed row or of a decoding forward, and logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache import TidarCache
from .families import Family, judge
from .layout import Layout
from .masks import attention_masks


class LayoutModel:
    """Runs a causal language model of transformers over layouts. Holds the model, owns nothing of it.

    The model itself stays usable as it was: without a layout every grafted layer is the stock one.
    """

    def __init__(self, model: Any) -> None:
        """Grafts what the model's family needs, in place.

        Args:
            model: a `…ForCausalLM` of a family in the family table.

        Raises:
            ValueError: the family cannot work; the message says why.
        """
        verdict = judge(model.config.to_dict())
        if verdict.family is None:
            raise ValueError(f"this model cannot decode by TiDAR: {verdict.reason}")
        self.model = model
        self.family: Family = verdict.family
        if self.family.mixing == "cca":
            from .cca import graft_cca

            graft_cca(model)

    def hidden_states(self, input_ids: Tensor, layout: Layout, cache: TidarCache | None = None) -> Tensor:
        """One forward of the decoder, without the head.

        Args:
            input_ids: (R, N) int64, laid out as `layout` says.
            layout: of (R, N).
            cache: of a decoding; the forward's states are written behind its committed tokens.

        Returns:
            (R, N, hidden) after the final norm.
        """
        committed = cache.committed if cache is not None else 0
        masks = attention_masks(self.family, self.model.config, layout, committed, self.model.dtype)
        if self.family.mixing == "cca":
            from .cca import predecessors_of

            masks["conv"] = predecessors_of(layout, self.model.config, cache)
        outputs = self.model.model(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=layout.position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(…, hidden) -> (…, vocabulary) float32."""
        return self.model.lm_head(hidden_states).float()

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        return self.model.get_input_embeddings().weight.device
