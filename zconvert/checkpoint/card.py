"""The model card of an exported checkpoint: lineage, licence, how to run it, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import BASE_CARD
from zconvert.errors import UserError
from zconvert.tidar.settings import GATED_FILE, TidarSettings

TAGS = ("tidar", "block-diffusion", "diffusion-language-model", "zconvert", "custom_generate")
_INHERITED = ("license", "license_name", "license_link", "language")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE_TEXTS = (("apache-2.0", "Apache License\n", "Version 2.0"), ("mit", "MIT License", "without restriction"))

_COLUMNS = (
    ("tokens_per_forward", "tokens per forward", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("speedup", "ratio to AR", "{:.2f}×"),
)


def inherited_metadata(folder: Path) -> dict[str, Any]:
    """What a card takes over from the base: licence and language, from its card or else its licence file."""
    found: dict[str, Any] = {}
    for name in (BASE_CARD, "README.md"):
        if (folder / name).is_file():
            front = _front_matter((folder / name).read_text(encoding="utf-8", errors="replace"))
            found = {key: front[key] for key in _INHERITED if front.get(key)}
            break
    if "license" not in found:
        for path in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENCE*")]):
            text = path.read_text(encoding="utf-8", errors="replace")[:4000]
            for identifier, *signs in _LICENCE_TEXTS:
                if all(sign in text for sign in signs):
                    return {**found, "license": identifier}
    return found


def model_card(
    *,
    name: str,
    settings: TidarSettings,
    config: Mapping[str, Any],
    inherited: Mapping[str, Any],
    has_recipe: bool,
    results: Mapping[str, Any] | None = None,
) -> str:
    """Writes the card.

    Args:
        name: the model's name, its title.
        settings: of the `tidar` section.
        config: the checkpoint's `config.json`.
        inherited: `inherited_metadata` of the checkpoint.
        has_recipe: whether `zconvert_config.yaml` lies beside the card.
        results: what `zconvert bench --json` printed; None where nothing was measured.

    Raises:
        UserError: the results are not those of a bench run.
    """
    import yaml

    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", **inherited}
    if settings.base_model and "/" in settings.base_model:  # a Hub id; a folder's name would be a dead link
        metadata |= {"base_model": settings.base_model, "base_model_relation": "finetune"}
    metadata["tags"] = [*TAGS, *(["mixture-of-experts"] if _is_moe(config) else [])]
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    sections = [
        f"# {name}",
        _summary(settings, config),
        f"## How to run it\n\n{_usage(settings)}",
        f"## What was done\n\n{_lineage(settings, has_recipe)}",
        f"## Measured\n\n{_measured(results)}",
        f"## Licence\n\n{_licence(inherited)}",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(text: str) -> dict[str, Any]:
    import yaml

    match = _FRONT_MATTER.match(text)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:  # somebody else's card: what cannot be read is not inherited
        return {}
    return values if isinstance(values, dict) else {}


def _is_moe(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def _base(settings: TidarSettings) -> str:
    base = settings.base_model
    if base is None:
        return "its base model"
    link = f"[{base}](https://huggingface.co/{base})" if "/" in base else f"`{base}`"
    return link + (f" at commit `{settings.base_revision}`" if settings.base_revision else "")


def _summary(settings: TidarSettings, config: Mapping[str, Any]) -> str:
    kind = (config.get("architectures") or [config.get("model_type")])[0]
    text = (
        f"{_base(settings)}, turned into a block-diffusion model by the TiDAR recipe "
        "([arXiv 2511.08923](https://arxiv.org/abs/2511.08923)): in one forward it verifies a draft autoregressively "
        f"and writes the next one by diffusion, up to {settings.block_size} tokens at a time. "
    )
    if settings.mode == "gated":
        text += (
            "The base model's weights are here byte for byte, as they were frozen in training; small weights beside "
            f"them (`{GATED_FILE}`) act at the slots of a draft only. So the autoregressive path is the base model's, "
            "bit for bit."
        )
    else:
        text += f"The weights are those of an unmodified `{kind}`, so it is a plain autoregressive model as well."
    if not settings.stages:
        text += (
            "\n\n**Not trained yet**: this is the converted starting point. It decodes correctly, but its drafts are "
            "rejected nearly always, so it is no faster than autoregressive decoding."
        )
    return text


def _usage(settings: TidarSettings) -> str:
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
    return f"""\
With TiDAR decoding; the code is in `custom_generate/`, read it before you trust it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "PATH_OR_HUB_ID"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=128)
print(tokenizer.decode(ids[0]))
```

As a plain autoregressive model: the same without `trust_remote_code=True`, or in any engine that serves its
architecture. {never}

By default decoding is lossless: the text is distributed as autoregressive sampling from {reference}"""


def _lineage(settings: TidarSettings, has_recipe: bool) -> str:
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
        f"training stages: {', '.join(settings.stages) or 'none'}",
        "recipe: " + ("`zconvert_config.yaml`" if has_recipe else "not kept with this checkpoint"),
        "versions and checksums: `provenance.json`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _measured(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "Nothing was measured for this card: neither speed nor quality. `zconvert bench` measures speed."
    entries = results.get("results", results)
    entries = entries if isinstance(entries, Mapping) else {}
    rows = {k: v for k, v in entries.items() if isinstance(v, Mapping) and _number(v, "tokens_per_second")}
    if not rows:
        raise UserError(
            "the results are not those of a bench run",
            found=f"keys {', '.join(map(str, entries)) or 'none'}",
            expected="what `zconvert bench --json` prints, with tokens_per_second for each sampler",
            fix="zconvert bench CHECKPOINT --json > bench.json",
        )
    lines = [
        "| sampler | " + " | ".join(title for _, title, _ in _COLUMNS) + " |",
        "|---|" + "---:|" * len(_COLUMNS),
    ]
    for name, entry in rows.items():
        cells = [form.format(entry[key]) if _number(entry, key) else "not measured" for key, _, form in _COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, text in (("source", "the source answered"), ("converted", "the converted model's AR path answered")):
        accuracy = entries.get(name)
        if isinstance(accuracy, Mapping) and _number(accuracy, "accuracy"):
            lines.append(f"\nAccuracy: {text} {accuracy['accuracy']:.1%}.")
    facts = {key: results[key] for key in ("device", "dtype", "batch_size", "prompts", "temperature") if key in results}
    facts |= {key: entries[key] for key in ("prompts",) if isinstance(entries.get(key), int)}
    if facts:
        lines.append("\nMeasured with " + ", ".join(f"{k} {v}" for k, v in facts.items() if _scalar(v)) + ".")
    lines.append("\nWhat is not listed here was not measured; ratios hold for this device, batch and text only.")
    return "\n".join(lines)


def _licence(inherited: Mapping[str, Any]) -> str:
    licence = inherited.get("license")
    name = inherited.get("license_name", licence) if licence == "other" else licence
    weights = f"The weights: {name}, inherited from the base model."
    if not licence:
        weights = "The weights: the base model's licence holds. It is not known from its files: look it up before use."
    return f"{weights} The code in `custom_generate/`: apache-2.0, from zconvert."


def _number(entry: Mapping[str, Any], key: str) -> bool:
    return isinstance(entry.get(key), int | float) and not isinstance(entry[key], bool)


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)
