"""The `datasets:` of a training recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from zconvert.recipe.sections import Count, CountOrZero, Section, Text

PROMPT_FIELDS = ("prompt", "text")
"""keys of a row of prompts: the first one that it has holds its prompt"""


class SelfGeneratedRecipe(Section):
    """`self_generated:` of a dataset: the checkpoint that is trained, run causally, goes on from prompts."""

    prompts: Text = Field(
        description="where the prompts are: as datasets[].path, read by the same type and fields; of type text, rows "
        f"have them under {', else '.join(PROMPT_FIELDS)}, unless datasets[].field names another key"
    )
    max_new_tokens: Count = Field(256, description="tokens of a continuation, at most; an EOS token ends it earlier")
    temperature: float = Field(1.0, ge=0, description="of sampling; 0: the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="share of the likeliest tokens that are sampled from")
    samples_per_prompt: Count = Field(1, description="continuations of each prompt")
    batch_size: Count = Field(16, description="continuations that are sampled together; changes what is drawn")
    seed: CountOrZero = Field(0, lt=2**32, description="seed of the sampling")
    train_on_prompts: bool = Field(False, description="score the prompts' tokens too, which are not the model's own")


class DatasetRecipe(Section):
    """One entry of `datasets:`."""

    path: Text | None = Field(
        None,
        description="a .jsonl or .parquet file (a document a row), a .txt file (one document), a folder of these, or a "
        "dataset's Hub id",
    )
    self_generated: SelfGeneratedRecipe | None = Field(
        None, description="instead of path: text that the checkpoint itself writes, after given prompts"
    )
    name: Text | None = Field(None, description="configuration of a Hub dataset")
    split: Text = Field("train", description="split of a Hub dataset")
    revision: Text | None = Field(None, description="branch, tag or commit of a Hub dataset; null: its main branch")

    type: Literal["text", "chat"] = Field(
        "text",
        description="text: plain documents, every token is trained on; chat: conversations, written out by the "
        "tokenizer's chat template, of which some turns are trained on",
    )
    field: Text = Field("text", description="key of the text in a row, for type text")
    field_messages: Text = Field("messages", description="key of the list of messages in a row, for type chat")
    field_tools: Text = Field(
        "tools", description="key of the list of tools in a row, which may lack it, for type chat"
    )
    roles_to_train: list[Text] = Field(["assistant"], description="roles whose turns are scored, for type chat")
    train_on_eot: bool = Field(True, description="score the token that ends such a turn, for type chat")
    add_bos: bool = Field(
        True, description="begin each document with the tokenizer's BOS token, if it has one, for type text"
    )
    add_eos: bool = Field(
        True, description="end each document with the tokenizer's EOS token, if it has one, for type text"
    )
    split_long: Literal["tokens", "paragraph"] = Field(
        "tokens",
        description="where a text longer than sequence_len is cut: at every sequence_len tokens; or after the last "
        "empty line in the second half of these, else the last line, else there. A longer conversation is a bad row",
    )

    weight: float | None = Field(
        None, gt=0, description="share of the tokens read, relative to the other datasets'; null: as many as it has"
    )
    streaming: bool = Field(
        False, description="read and tokenise while training, without a copy on disk; shuffled only over a part"
    )
    shuffle_buffer_size: Count = Field(1000, description="rows that are shuffled together, where streaming")
    max_row_bytes: Count = Field(100_000_000, description="a longer row, or text file, is a bad row")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="what a row that cannot be used does: end the command, or be told of and left out"
    )

    @field_validator("self_generated")
    @classmethod
    def _one_source(cls, value: SelfGeneratedRecipe | None, info: ValidationInfo) -> SelfGeneratedRecipe | None:
        if (value is None) == (info.data.get("path") is None):
            raise ValueError("expected either path or self_generated")
        return value

    @field_validator("streaming")
    @classmethod
    def _generated_is_whole(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("self_generated") is not None:
            raise ValueError("expected false, since self_generated is written to disk first")
        return value

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return self.path if self.path is not None else f"text of its own after {self.prompts_path}"

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """Keys of the text in a row of prompts, in the order in which they are looked for."""
        return PROMPT_FIELDS if self.field == type(self).model_fields["field"].default else (self.field,)

    @property
    def prompts_path(self) -> str | None:
        """Where the prompts are, of self-generated data."""
        return None if self.self_generated is None else self.self_generated.prompts


def check_mixture(datasets: list[DatasetRecipe]) -> list[DatasetRecipe]:
    """Weights are for all or for none; a stream among others has no length, so it needs one."""
    weighted = [dataset.weight is not None for dataset in datasets]
    if any(weighted) and not all(weighted):
        raise ValueError(f"expected a weight for every entry or for none, found {sum(weighted)} of {len(datasets)}")
    if len(datasets) > 1 and any(dataset.streaming for dataset in datasets) and not all(weighted):
        raise ValueError("expected a weight for every entry, since one is streamed and has no known length")
    return datasets
