"""The recipes of the training stages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from zconvert.recipe.data import DatasetRecipe, check_mixture
from zconvert.recipe.parallel import ParallelRecipe
from zconvert.recipe.sections import Count, CountOrZero, Recipe, Section, Share, Text
from zconvert.recipe.watching import EvaluationSection, MoeSection


class TrainingDiffusion(Section):
    """The `diffusion:` section of a training stage's recipe."""

    alpha: float = Field(
        1.0,
        ge=0,
        description="weight of the AR loss: loss = (alpha · AR + diffusion) / (1 + alpha); gated checkpoints have none",
    )
    objective: Literal["data", "forward_kl", "total_variation"] | None = Field(
        None,
        description="what mask slots learn: the data's tokens, or the AR distribution of the same position "
        "(KL divergence from it, or total variation, which is the share of drafts rejected and learns little until "
        "drafts are good: run it after forward_kl); null: forward_kl for gated checkpoints, data for others",
    )
    block_offset: Literal["zero", "random"] = Field(
        "zero", description="phase of the blocks: zero starts one at each document, random draws it per document"
    )
    diffusion_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="mask slots per clean token of a row; below 1, whole blocks of those scored are drawn, and "
        "a step costs (1 + diffusion_fraction) / 2",
    )
    bigram_tokens: int = Field(
        2_000_000,
        ge=0,
        description="training tokens in which it is counted which token follows which, for the drafts; 0: none",
    )


class TrainingRecipe(Recipe):
    """What the recipe of every training stage has."""

    datasets: list[DatasetRecipe] = Field(
        min_length=1, description="training documents: all of them in each epoch, or mixed by weight"
    )
    dataset_num_proc: CountOrZero = Field(0, description="processes that tokenise in the background; 0: none")
    dataset_prepared_path: Text | None = Field(
        None, description="folder of the tokenised datasets, which other runs can share; null: prepared/ in output_dir"
    )
    chat_template: Text | None = Field(
        None, description="file with the Jinja template of conversations; null: the tokenizer's own"
    )

    sequence_len: int = Field(1024, ge=2, description="clean tokens per row")
    sample_packing: bool = Field(True, description="several whole documents per row; false: one document per row")
    micro_batch_size: Count = Field(1, description="rows per forward of one process")
    gradient_accumulation_steps: Count = Field(1, description="forwards per optimizer step")

    max_steps: Count = Field(description="optimizer steps of the whole run")
    learning_rate: float = Field(2e-5, gt=0, lt=1, description="peak learning rate")
    lr_scheduler: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warm-up: cosine decay, wsd (flat, then linear decay) or constant"
    )
    warmup_steps: CountOrZero = Field(0, description="steps of linear warm-up, within max_steps")
    decay_steps: CountOrZero = Field(0, description="last steps, in which wsd decays; 0 with the other schedules")
    min_lr_ratio: Share = Field(0.0, description="learning rate at the end, as a share of the peak")

    optimizer: Literal["adamw", "muon", "adamw_8bit"] = Field(
        "adamw",
        description="muon: for hidden matrices and experts, AdamW for the rest, at the same learning rate; adamw_8bit: "
        "AdamW whose state takes a quarter of the memory, by torchao",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's decay of the gradient's mean")
    weight_decay: float = Field(0.1, ge=0, lt=1, description="weight decay of matrices; vectors have none")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the gradient's mean")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW decay of the gradient's square")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number format of the forward pass")
    quantization: Literal["8bit", "4bit"] | None = Field(
        None,
        description="of gated checkpoints: the frozen source's weights are held in memory in so many bits, by "
        "bitsandbytes; its files stay as they are",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about a third slower")
    loss_chunk_size: Count | None = Field(
        None, description="tokens whose logits are made at a time; null: as many as take half a GiB"
    )
    attention: Literal["auto", "flex", "sdpa"] = Field(
        "auto", description="flex: compiled FlexAttention, on a GPU; auto: that where the family can, else sdpa"
    )
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] | None = Field(
        None, description="how transformers computes experts; null: the fastest that the family can"
    )
    num_threads: Count | None = Field(None, description="CPU threads; null: torch's own choice")

    logging_steps: Count = Field(10, description="steps between progress reports and lines of metrics.jsonl")
    save_steps: Count = Field(500, description="steps between train states, for resuming; the last step saves one too")
    save_minutes: float | None = Field(None, gt=0, description="minutes after which a train state is saved as well")
    checkpoint_steps: Count | None = Field(
        None,
        description="steps between checkpoints that others can load, output_dir/checkpoint-STEP; null: the last only",
    )
    save_total_limit: Count = Field(2, description="train states kept")
    save_dtype: Literal["source", "float32", "bfloat16"] = Field(
        "source", description="number format of the checkpoint written; source: each tensor as in base_model"
    )
    resume_from_checkpoint: Text = Field(
        "auto",
        description="auto: go on from the newest train state in output_dir; never: refuse a folder that has one; or "
        "another run's train state, to start from where output_dir has none yet",
    )
    diffusion: TrainingDiffusion = Field(TrainingDiffusion(), description="the diffusion objective")
    moe: MoeSection = Field(MoeSection(), description="routers and their balance")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="measurements on held-out documents")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [],
        description="experiment trackers that get the metrics too, each a package to install; metrics.jsonl is always",
    )
    parallel: ParallelRecipe = Field(ParallelRecipe(), description="how several processes share the work")

    @field_validator("datasets")
    @classmethod
    def _mixture(cls, datasets: list[DatasetRecipe]) -> list[DatasetRecipe]:
        return check_mixture(datasets)

    @field_validator("warmup_steps", "decay_steps")
    @classmethod
    def _within_the_run(cls, steps: int, info: ValidationInfo) -> int:
        max_steps, warmup = info.data.get("max_steps"), info.data.get("warmup_steps", 0)
        if info.field_name == "decay_steps" and "lr_scheduler" in info.data:
            scheduler = info.data["lr_scheduler"]
            if scheduler == "wsd" and steps == 0:
                raise ValueError("expected at least 1, since lr_scheduler is wsd")
            if scheduler != "wsd" and steps > 0:
                raise ValueError(f"expected 0, since lr_scheduler is {scheduler}")
        if max_steps is not None and info.field_name == "warmup_steps" and steps > max_steps:
            raise ValueError(f"expected at most max_steps, {max_steps}")
        if max_steps is not None and info.field_name == "decay_steps" and steps > max(0, max_steps - warmup):
            raise ValueError(f"expected at most max_steps − warmup_steps, {max(0, max_steps - warmup)}")
        return steps


class MidtrainRecipe(TrainingRecipe):
    """Recipe of `zconvert midtrain`."""

    stage = "midtrain"


class SftRecipe(TrainingRecipe):
    """Recipe of `zconvert sft`: conversations, scored where some role speaks."""

    stage = "sft"

    @field_validator("datasets")
    @classmethod
    def _has_conversations(cls, datasets: list[DatasetRecipe]) -> list[DatasetRecipe]:
        if all(dataset.type == "text" for dataset in datasets):
            raise ValueError("expected at least one entry with type: chat; midtrain is for text alone")
        return datasets
