"""The model `zconvert` of lm_eval (EleutherAI's harness): its tasks on the batched engine.

    zconvert lm-eval run --model zconvert --model_args pretrained=./my-run,sampler=mix:0.5 --tasks gsm8k

`generate_until` decodes by the sampler; `loglikelihood` and its kin are the AR path, as of any model of transformers.
All else, from prompts to stop texts and batches, is lm_eval's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from zconvert.checkpoint.load import end_token_ids, load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.evaluation.samplers import sampler_weights
from zconvert.evaluation.sampling import plans_of
from zconvert.serving.text import GrowingText
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import Request
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.generate_options import unpadded


@register_model("zconvert")
class ZconvertLM(HFLM):
    """A converted checkpoint, decoded by TiDAR."""

    def __init__(
        self,
        pretrained: str,
        sampler: str = "lossless",
        block_size: int | None = None,
        dtype: str = "auto",
        device: str | None = "auto",
        revision: str | None = None,
        batch_size: int | str | None = 1,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Loads the checkpoint.

        Args:
            pretrained: a checkpoint's folder, a training run's folder, or a Hub id.
            sampler: ar, lossless or mix:<w>.
            block_size: tokens a forward can yield at most; None: as trained.
            dtype: float32, bfloat16 or auto.
            device: cpu, cuda or auto.
            revision: branch, tag or commit, for a Hub id.
            batch_size: texts decoded at a time.
            seed: of sampling, where a task samples.
            **kwargs: further options of lm_eval's HFLM, such as max_length or add_bos_token.
        """
        source = resolve(pretrained, revision=revision)
        settings = require_converted(source)
        # "cuda:0" is the default of lm_eval's command line, which means a CPU too where there is nothing else.
        named = device is not None and (device != "cuda:0" or torch.cuda.is_available())
        model, tokenizer = load_model(source, dtype=dtype, device=str(device) if named else "auto")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **kwargs)
        self._seed = seed
        eos = end_token_ids(model, tokenizer)
        (self._plan,) = plans_of(settings, sampler_weights([sampler]), Sampling(), eos, block_size=block_size).values()
        self._layout_model = layout_model_of(model)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: Sequence[str], **generation_kwargs: Any
    ) -> Tensor:
        """(R, N) prompts, padded on the left -> (R, up to max_length) ids, padded on the right."""
        mask = generation_kwargs.pop("attention_mask")
        sampling = self._sampling(generation_kwargs)
        prompts, _ = unpadded(context, mask)
        budget = max_length - context.shape[1]
        ends = [GrowingText(self.tokenizer, prompt, stop).stop for prompt in prompts]
        requests = [
            Request(prompt, budget, sampling, self._seed + row, stop=ends[row], key=row)
            for row, prompt in enumerate(prompts)
        ]
        engine = Engine(self._layout_model, self._plan, max_batch=len(requests))
        texts = {result.request.key: result.tokens for result in run(engine, requests)}
        width = max(map(len, texts.values()))
        pad = self.tokenizer.pad_token_id
        new = [texts[row] + [pad] * (width - len(texts[row])) for row in range(len(prompts))]
        return torch.cat([context, torch.tensor(new, device=context.device)], dim=1)

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """A task's generation options; greedy unless it samples, as lm_eval does. What is not known is refused."""
        temperature = options.pop("temperature", 0.0) or 0.0
        if options.pop("do_sample", temperature > 0) is False:
            temperature = 0.0
        top_k, top_p = options.pop("top_k", None) or 0, options.pop("top_p", None) or 1.0
        if options:
            raise ValueError(f"generation options {', '.join(options)} are not known to the model zconvert")
        return Sampling(temperature, top_k, top_p, mix_weight=self._plan.sampling.mix_weight)


def main(arguments: Sequence[str]) -> None:
    """Runs lm_eval's own command line, in which the model `zconvert` is known.

    Args:
        arguments: of `lm-eval`.
    """
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
