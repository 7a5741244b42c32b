"""Recipes for large models with sizes swapped for tiny ones, everything else as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = Path(__file__).parent.parent / "recipes" / "quickstart" / "chat.jinja"


def made_small(settings: dict[str, Any], *, text: Path, chat: Path) -> dict[str, Any]:
    """The settings of a stage, so that it takes a second or two on a tiny model.

    Args:
        settings: of a recipe.
        text: documents to train on.
        chat: conversations to train on.
    """
    settings = {**settings}
    if "datasets" not in settings:  # convert-init
        diffusion = {**settings.get("diffusion", {})}
        if diffusion.get("mode") == "gated":
            diffusion["gated"] = {**diffusion.get("gated", {}), "rank": 2, "mlp_width": 8}
        return {**settings, "diffusion": diffusion}
    of_chat = any(dataset.get("type") == "chat" for dataset in settings["datasets"])
    data: list[dict[str, str]] = [{"path": str(chat), "type": "chat"} if of_chat else {"path": str(text)}]
    if of_chat:
        settings["chat_template"] = settings.get("chat_template") or str(CHAT_TEMPLATE)
    settings |= {"datasets": data, "sequence_len": 64, "max_steps": 2, "warmup_steps": 0, "logging_steps": 1}
    settings |= {"gradient_accumulation_steps": 1, "micro_batch_size": 1, "num_threads": 1}
    if "evaluation" in settings:
        settings["evaluation"] = {**settings["evaluation"], "datasets": data, "rows": 1, "prompts": 1, "new_tokens": 4}
    if "context" in settings:
        context = {"original_len": 32, "target_len": 64, "report_documents": 1}
        settings["context"] = {**settings["context"], **context}
    return settings
