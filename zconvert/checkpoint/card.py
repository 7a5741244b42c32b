"""The model card of an exported checkpoint: lineage, licence, how to run it, what was measured, and its limits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert import __version__
from zconvert.checkpoint.anatomy import experts_of
from zconvert.checkpoint.folder import BASE_CARD
from zconvert.checkpoint.measured import measured_section
from zconvert.checkpoint.small_files import read_small
from zconvert.recipe.yaml_text import read_yaml
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import GATED_FILE, TidarSettings

TAGS = ("tidar", "block-diffusion", "diffusion-language-model", "zconvert", "custom_generate")
_INHERITED = ("license", "license_name", "license_link", "language")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_MOST_FRONT, _MOST_WORD = 100_000, 500
"""characters"""
_LICENCE_TEXTS = (("apache-2.0", "Apache License\n", "Version 2.0"), ("mit", "MIT License", "without restriction"))


@dataclass(frozen=True)
class Facts:
    """What a card tells beside the checkpoint's own settings."""

    history: Sequence[Mapping[str, Any]] = ()
    """the stages, as `provenance.json` has them"""
    rewritten: Mapping[str, Any] | None = None
    """how the weight files differ from the trained checkpoint's: `dtype`, `shards`"""
    results: Mapping[str, Any] | None = None
    """what `zconvert bench --json` printed"""
    evaluation: Mapping[str, Any] | None = None
    """what `zconvert evaluate` measured"""
    serving: str = ""
    """`serving_lines` of the checkpoint"""
    plots: Sequence[str] = ()
    """images that lie beside the card"""


def inherited_metadata(folder: Path) -> dict[str, Any]:
    """What a card takes over from the base: licence and language, from its card or else its licence file."""
    found: dict[str, Any] = {}
    for name in (BASE_CARD, "README.md"):
        if (folder / name).is_file():
            front = _front_matter(_text(folder / name))
            found = {key: front[key] for key in _INHERITED if _is_plain(front.get(key))}
            break
    if "license" not in found:
        for path in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENCE*")]):
            text = _text(path)[:4000]
            for identifier, *signs in _LICENCE_TEXTS:
                if all(sign in text for sign in signs):
                    return {**found, "license": identifier}
    return found


def _text(path: Path) -> str:
    return read_small(path).decode("utf-8", errors="replace").replace("\r\n", "\n")


def model_card(
    name: str,
    settings: TidarSettings,
    config: Mapping[str, Any],
    inherited: Mapping[str, Any],
    facts: Facts | None = None,
) -> str:
    """Writes the card.

    Args:
        name: the model's name, its title.
        settings: of the `tidar` section.
        config: the checkpoint's `config.json`.
        inherited: `inherited_metadata` of the checkpoint.
        facts: what else there is to tell.

    Raises:
        UserError: the results are not those of a bench run.
    """
    import yaml

    facts = facts or Facts()
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", **inherited}
    if _on_hub(settings.base_model):  # a folder's name would be a dead link
        metadata |= {"base_model": settings.base_model, "base_model_relation": "finetune"}
    metadata["tags"] = [*TAGS, *(["mixture-of-experts"] if experts_of(language_config(dict(config))) else [])]
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    sections = [
        f"# {name}",
        _summary(settings, config, facts),
        f"## How to run it\n\n{_usage(settings, config, facts)}",
        f"## What was done\n\n{_lineage(settings, facts)}",
        f"## Measured\n\n{_measured(facts)}",
        f"## Limits\n\n{_limits(settings)}",
        f"## How to make it again\n\n{_commands(settings, facts)}",
        f"## Licence\n\n{_licence(inherited)}",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(text: str) -> dict[str, Any]:
    """What a card says of itself; nothing where it cannot be read or has more than plain values: strangers write it."""
    match = _FRONT_MATTER.match(text[:_MOST_FRONT])
    try:
        return read_yaml(match[1])[0] if match else {}
    except ValueError:
        return {}


def _is_plain(value: Any) -> bool:
    """Whether it is a word or some words."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and 0 < len(word) <= _MOST_WORD for word in words)


def _on_hub(base: str | None) -> bool:
    return base is not None and "/" in base


def _base(settings: TidarSettings) -> str:
    base = settings.base_model
    if base is None:
        return "its base model"
    link = f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"`{base}`"
    return link + (f" at commit `{settings.base_revision}`" if settings.base_revision else "")


def _summary(settings: TidarSettings, config: Mapping[str, Any], facts: Facts) -> str:
    kind = (config.get("architectures") or [config.get("model_type")])[0]
    text = (
        f"{_base(settings)}, turned into a block-diffusion model by the TiDAR recipe "
        "([arXiv 2511.08923](https://arxiv.org/abs/2511.08923)): in one forward it verifies a draft autoregressively "
        f"and writes the next one by diffusion, up to {settings.block_size} tokens at a time. "
    )
    if settings.mode == "gated":
        text += f"The base model's weights {_as_stored(facts)}; small weights beside them (`{GATED_FILE}`) act at the "
        text += "slots of a draft only. So the autoregressive path is the base model's"
        text += "." if "dtype" in (facts.rewritten or {}) else ", bit for bit."
    else:
        text += f"The weights are those of an unmodified `{kind}`, so it is a plain autoregressive model as well."
    if not settings.stages:
        text += (
            "\n\n**Not trained yet**: this is the converted starting point. It decodes correctly, but its drafts are "
            "rejected nearly always, so it is no faster than autoregressive decoding."
        )
    return text


def _as_stored(facts: Facts) -> str:
    rewritten = facts.rewritten or {}
    if "dtype" in rewritten:
        return f"are here stored as {rewritten['dtype']}, frozen in training"
    if rewritten:
        return "are here value for value, in other files, as they were frozen in training"
    return "are here byte for byte, as they were frozen in training"


def _usage(settings: TidarSettings, config: Mapping[str, Any], facts: Facts) -> str:
    names, model = config.get("architectures") or [], dict(config)
    composite = language_config(model) is not model and names
    kind = names[0] if composite else "AutoModelForCausalLM"
    never = f"""\
Never let it emit the mask token `{settings.mask_token}` (id {settings.mask_token_id}); \
`generation_config.json` suppresses it."""
    if settings.virtual:
        never = "It is the base model then, token by token."
    reference = f"""\
this model is. It is not
lossless with respect to the base model, whose weights were {"trained further" if settings.stages else "the start"}."""
    if settings.mode == "gated":
        reference = "the base model is,\nwhose weights nothing has moved."
    serving = f"\n\n{facts.serving}" if facts.serving else ""
    return f"""\
**With TiDAR decoding.** The code is in `custom_generate/`; read it before you trust it.

```python
from transformers import {kind}, AutoTokenizer

path = "PATH_OR_HUB_ID"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {kind}.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=128)
print(tokenizer.decode(ids[0]))
```

**As a plain autoregressive model.** The same without `trust_remote_code=True`. {never}

**In a serving engine**, autoregressively: none decodes by TiDAR yet.{serving}

By default decoding is lossless: the text is distributed as autoregressive sampling from {reference}"""


def _lineage(settings: TidarSettings, facts: Facts) -> str:
    origin = {
        "existing": "an entry that the tokenizer had",
        "spare_row": "a spare row of the embedding",
        "grown": "a new row of the embedding",
    }
    mask = f"`{settings.mask_token}` (id {settings.mask_token_id}), "
    mask += origin.get(settings.mask_token_source, settings.mask_token_source)
    if settings.virtual:
        mask = f"none in the vocabulary: slots of a draft have an embedding of their own (id {settings.mask_token_id})"
    proposals = "all" if settings.proposals is None else ", ".join(map(str, settings.proposals))
    lines = [
        f"base model: {_base(settings)}",
        f"mask token: {mask}",
        *([f"gated weights: {settings.gated.described()}"] if settings.gated is not None else []),
        f"block size: {settings.block_size} tokens; block offset in training: {settings.block_offset}",
        f"proposals in decoding: {proposals}",
        f"training stages: {_stages(settings, facts)}",
        "recipes: " + ("`zconvert_config.yaml`" if facts.history else "not kept with this checkpoint"),
        "versions and checksums: `provenance.json`",
    ]
    if facts.rewritten:
        lines.append("weight files: " + ", ".join(f"{key} {value}" for key, value in facts.rewritten.items()))
    images = "".join(f"\n\n![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in facts.plots)
    return "\n".join(f"- {line}" for line in lines) + images


def _stages(settings: TidarSettings, facts: Facts) -> str:
    """The stages with the tokens that each saw, where the history tells."""
    trained = [entry for entry in facts.history if "steps" in entry]
    if [entry.get("stage") for entry in trained] != list(settings.stages):
        return ", ".join(settings.stages) or "none"
    told = [f"{entry['stage']} ({entry['steps']:,} steps, {entry.get('tokens_seen', 0):,} tokens)" for entry in trained]
    return ", ".join(told) or "none"


def _measured(facts: Facts) -> str:
    text = measured_section(facts.results, facts.evaluation)
    dtype = (facts.rewritten or {}).get("dtype")
    if dtype is not None and (facts.results or facts.evaluation):
        text += f" All of it was measured before the weights were stored as {dtype}."
    return text


def _limits(settings: TidarSettings) -> str:
    lines = [
        "Greedy text equals autoregressive text in float32. In bfloat16 and float16 it may part by rounding, because "
        "the forwards have other shapes.",
        '`sampler="mixed"` is faster and changes the distribution of the text: it is not lossless.',
        "A forward over a block costs more than one over a token, so tokens per forward is not speed; on a device that "
        "is bound by memory a mixture of experts may gain little or lose. Measure on yours.",
        "The base model's knowledge, biases and faults were not looked at anew.",
    ]
    if settings.mode == "full" and settings.stages:
        lines.insert(1, "All weights were trained further, so its answers are not the base model's.")
    return "\n".join(f"- {line}" for line in lines)


def _commands(settings: TidarSettings, facts: Facts) -> str:
    stages = [str(entry.get("stage")) for entry in facts.history]
    if not stages:
        return "The recipes were not kept with this checkpoint, so there are no commands that make it again."
    lines = []
    for number, stage in enumerate(stages, 1):
        last = stage not in stages[number:]  # of that name, which is the one that the command takes
        file = "zconvert_config.yaml" if last else f"{number}-{stage}.yaml  # its recipe, in a file of its own"
        lines.append(f"zconvert {shlex.quote(stage)} {file}")
    recipe = facts.history[-1].get("recipe")
    folder = shlex.quote(str(recipe.get("output_dir", "CHECKPOINT") if isinstance(recipe, Mapping) else "CHECKPOINT"))
    options = [f"--dtype {facts.rewritten['dtype']}"] if facts.rewritten and "dtype" in facts.rewritten else []
    lines.append(" ".join([f"zconvert export {folder} --out DIR", *options]))
    return f"""\
With zconvert {__version__} and the data that the recipes name:

```
{chr(10).join(lines)}
```"""


def _licence(inherited: Mapping[str, Any]) -> str:
    licence = inherited.get("license")
    name = inherited.get("license_name", licence) if licence == "other" else licence
    weights = f"The weights: {name}, inherited from the base model."
    if not licence:
        weights = "The weights: the base model's licence holds. It is not known from its files: look it up before use."
    return f"{weights} The code in `custom_generate/`: apache-2.0, from zconvert."
