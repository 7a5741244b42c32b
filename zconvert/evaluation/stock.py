"""What transformers offers without a conversion: its own `generate`, plain, with prompt lookup, or assisted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

LOOKUP_TOKENS = 10  # what transformers' documentation recommends for prompt lookup


class StockDecoder:
    """Decodes batches by `model.generate`, with a static cache where that works and is faster."""

    def __init__(
        self,
        model: Any,
        how: str,
        eos_token_ids: frozenset[int],
        mask_token_id: int,
        temperature: float,
        assistant: Any = None,
    ) -> None:
        """Prepares the options.

        Args:
            model: a causal language model of transformers.
            how: stock, prompt_lookup or assisted.
            eos_token_ids: tokens that end a text.
            mask_token_id: never chosen, as in our own decoding.
            temperature: 0 is greedy.
            assistant: the smaller model of assisted decoding.
        """
        self._model = model
        self._eos = sorted(eos_token_ids)
        self._pad = self._eos[0] if self._eos else mask_token_id
        self._options: dict[str, Any] = {
            "eos_token_id": self._eos or None,
            "pad_token_id": self._pad,
            "do_sample": temperature > 0,
        }
        if mask_token_id < model.config.get_text_config().vocab_size:  # a virtual one has no logit
            self._options["suppress_tokens"] = [mask_token_id]
        if temperature > 0:
            self._options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if how == "prompt_lookup":
            self._options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        if how == "assisted":
            self._options["assistant_model"] = assistant
        self._cache: dict[str, Any] | None = {} if how != "stock" else None

    def generate(self, prompts: Sequence[list[int]], length: int) -> list[list[int]]:
        """New tokens of each prompt, an end token included. The first call chooses the cache."""
        if self._cache is None:
            self._cache = self._faster_cache(prompts, length)
        return self._run(prompts, length, self._cache)

    def _faster_cache(self, prompts: Sequence[list[int]], length: int) -> dict[str, Any]:
        took: dict[str, float] = {}
        texts: dict[str, list[list[int]]] = {}
        for name in ("dynamic", "static", "dynamic", "static"):
            options = {"cache_implementation": "static"} if name == "static" else {}
            started = time.perf_counter()
            try:
                texts[name] = self._run(prompts, length, options)
            except Exception:  # a family without a static cache
                if name == "dynamic":
                    raise
                continue
            took[name] = min(took.get(name, float("inf")), time.perf_counter() - started)
        right = texts.get("static") == texts["dynamic"] or self._options["do_sample"]
        return (
            {"cache_implementation": "static"} if right and took.get("static", float("inf")) < took["dynamic"] else {}
        )

    @torch.inference_mode()
    def _run(self, prompts: Sequence[list[int]], length: int, options: dict[str, Any]) -> list[list[int]]:
        width, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in prompts], device=device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = self._model.generate(ids, attention_mask=seen, max_new_tokens=length, **self._options, **options)
        texts = []
        for row in out[:, width:].tolist():
            ends = [i for i, token in enumerate(row) if token in self._eos]
            texts.append(row[: ends[0] + 1] if ends else row)
        return texts
