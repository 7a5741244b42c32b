"""The `datasets:` of a training recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from zconvert.recipe.sections import Section, Text


class DatasetRecipe(Section):
    """One entry of `datasets:`."""

    path: Text = Field(
        description="a .jsonl file (one document a line), a .txt file (one document), or a folder of them"
    )
    type: Literal["text"] = Field("text", description="text: plain documents, every token is trained on")
    field: Text = Field("text", description="key of the text in a .jsonl line")
    add_bos: bool = Field(True, description="begin each document with the tokenizer's BOS token, if it has one")
    add_eos: bool = Field(True, description="end each document with the tokenizer's EOS token, if it has one")
