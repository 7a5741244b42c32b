"""Runs an exported folder as somebody else would, in an interpreter of its own in which zconvert cannot be imported.

    python -P probe.py FOLDER CLASS LOGITS.safetensors < {"ids": [...], "prompts": [[...], ...], "max_new_tokens": 16}

CLASS is the transformers class to load by. On stdout comes a JSON object: the greedy texts of the prompts without trust
and with it (`plain`, `tidar`), for each prompt by how much the logits of the two tokens differ where the texts part
(`gaps`, null where they do not), and the `module` that the trusted `generate` came from. The file gets the `logits` of
the ids. Nothing of zconvert is imported here, so that nothing can be missing elsewhere.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class _NoZconvert:
    """Has imports of zconvert fail as they do where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuses zconvert, and leaves the rest to others."""
        if name.split(".")[0] == "zconvert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    """Reads the request from stdin and writes the answer to stdout."""
    sys.meta_path.insert(0, _NoZconvert())
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, kind, logits_file = sys.argv[1:]
    request = json.load(sys.stdin)

    def load(trust: bool) -> Any:
        found = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust, local_files_only=True
        )
        return found.eval()

    def texts(model: Any) -> list[list[int]]:
        options = {"max_new_tokens": request["max_new_tokens"], "do_sample": False}
        prompts = [torch.tensor([prompt]) for prompt in request["prompts"]]
        return [model.generate(p, attention_mask=torch.ones_like(p), **options)[0].tolist() for p in prompts]

    def gap(model: Any, one: list[int], other: list[int]) -> float | None:
        if one == other:
            return None
        place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if place is None:  # one goes on where the other ends
            return float("inf")
        logits = model(torch.tensor([one[:place]]), use_cache=False).logits[0, -1]
        return float((logits[one[place]] - logits[other[place]]).abs())

    with torch.inference_mode():
        model = load(trust=False)
        logits = model(torch.tensor([request["ids"]]), use_cache=False).logits[0].float().contiguous()
        save_file({"logits": logits}, logits_file)
        plain = texts(model)
        del model, logits
        model = load(trust=True)
        tidar = texts(model)
        gaps = [gap(model, one, other) for one, other in zip(plain, tidar, strict=True)]
    module = getattr(getattr(model.generate, "func", None), "__module__", None)
    version = transformers.__version__
    json.dump({"plain": plain, "tidar": tidar, "gaps": gaps, "module": module, "transformers": version}, sys.stdout)


if __name__ == "__main__":
    main()
