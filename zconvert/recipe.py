"""Recipes: one YAML file a stage, checked whole before anything is loaded. Each setting is defined here, once.

    recipe = load_recipe(Path("recipes/quickstart/midtrain.yaml"), MidtrainRecipe)

Paths in a recipe are relative to the folder where the command runs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from zconvert.errors import UserError
from zconvert.recipe_yaml import KeyPath, Problem, dotted, read_yaml, write_yaml
from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, MAX_BLOCK_SIZE, GatedParts, check_proposals

_MAX_RECIPE_BYTES = 1_000_000

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    # Strict: `"8"` is no number and 1 is no boolean; a wrong type is more often a slip than a wish.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


class Recipe(_Section):
    """What every stage's recipe has."""

    base_model: Text = Field(description="checkpoint to start from: a local folder, a run's folder or a Hub id")
    revision: Text | None = Field(None, description="Hub branch, tag or commit of base_model; null: its main branch")
    output_dir: Text = Field(description="folder to write; convert-init refuses one that exists")
    seed: CountOrZero = Field(0, lt=2**32, description="seed of everything random in the stage")


class GatedSection(_Section):
    """The `gated:` section of a convert-init recipe: which weights act at mask slots, and how large they are."""

    rank: CountOrZero = Field(GatedParts.rank, description="rank of the updates of attention projections; 0: none")
    mlp: Literal["none", "add", "replace"] = Field(
        "replace", description="what the diffusion expert does at mask slots: replace the routed experts, add to them"
    )
    mlp_width: Count = Field(GatedParts.mlp_width, description="hidden units of the diffusion expert")
    mask_embedding: bool = Field(GatedParts.mask_embedding, description="mask slots have an embedding of their own")


class ConvertInitDiffusion(_Section):
    """The `diffusion:` section of a convert-init recipe."""

    mode: Literal["full", "gated"] = Field(
        "full", description="full: every weight is trained; gated: the source stays as it is, small weights are added"
    )
    gated: GatedSection = Field(GatedSection(), description="the added weights of mode gated")

    block_size: int = Field(
        DEFAULT_BLOCK_SIZE,
        ge=2,
        le=MAX_BLOCK_SIZE,
        validation_alias=AliasChoices("block_size", "block_length"),
        description="tokens per diffusion block",
    )
    mask_token: Annotated[Text | CountOrZero, Field(union_mode="left_to_right")] | None = Field(
        None, description="mask token, by text or id; null: an existing one, else a spare row, else a new row"
    )
    mask_init: str = Field(
        "mean",
        pattern=r"^(mean|zero|random|copy:.+)$",
        description="start value of the mask token's row: mean, zero, random or copy:<token>",
    )
    proposals: list[Count] | None = Field(
        None, description="accepted counts that get a proposal block in decoding; null: all, 1 to block_size"
    )

    @field_validator("proposals")
    @classmethod
    def _within_the_block(cls, proposals: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if proposals is None or "block_size" not in info.data:
            return proposals
        return list(check_proposals(tuple(proposals), info.data["block_size"]))


class ConvertInitRecipe(Recipe):
    """Recipe of `zconvert convert-init`."""

    diffusion: ConvertInitDiffusion = Field(ConvertInitDiffusion(), description="what makes it a diffusion model")


class DatasetRecipe(_Section):
    """One entry of `datasets:`."""

    path: Text = Field(
        description="a .jsonl file (one document a line), a .txt file (one document), or a folder of them"
    )
    type: Literal["text"] = Field("text", description="text: plain documents, every token is trained on")
    field: Text = Field("text", description="key of the text in a .jsonl line")
    add_bos: bool = Field(True, description="begin each document with the tokenizer's BOS token, if it has one")
    add_eos: bool = Field(True, description="end each document with the tokenizer's EOS token, if it has one")


class MidtrainDiffusion(_Section):
    """The `diffusion:` section of a midtrain recipe."""

    alpha: float = Field(
        1.0,
        ge=0,
        description="weight of the AR loss: loss = (alpha · AR + diffusion) / (1 + alpha); gated checkpoints have none",
    )
    objective: Literal["data", "forward_kl"] | None = Field(
        None,
        description="what mask slots learn: the data's tokens, or the AR distribution of the same position "
        "(KL divergence from it); null: forward_kl for gated checkpoints, data for others",
    )
    block_offset: Literal["zero", "random"] = Field(
        "zero", description="phase of the blocks: zero starts one at each document, random draws it per document"
    )


class MidtrainRecipe(Recipe):
    """Recipe of `zconvert midtrain`."""

    datasets: list[DatasetRecipe] = Field(min_length=1, description="training documents, all of them in each epoch")

    sequence_len: int = Field(1024, ge=2, description="clean tokens per row")
    sample_packing: bool = Field(True, description="several whole documents per row; false: one document per row")
    micro_batch_size: Count = Field(1, description="rows per forward")
    gradient_accumulation_steps: Count = Field(1, description="forwards per optimizer step")

    max_steps: Count = Field(description="optimizer steps of the whole run")
    learning_rate: float = Field(2e-5, gt=0, lt=1, description="peak learning rate")
    lr_scheduler: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warm-up: cosine decay, wsd (flat, then linear decay) or constant"
    )
    warmup_steps: CountOrZero = Field(0, description="steps of linear warm-up, within max_steps")
    decay_steps: CountOrZero = Field(0, description="last steps, in which wsd decays; 0 with the other schedules")
    min_lr_ratio: Share = Field(0.0, description="learning rate at the end, as a share of the peak")

    weight_decay: float = Field(0.1, ge=0, lt=1, description="AdamW weight decay of matrices; vectors have none")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the gradient's mean")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW decay of the gradient's square")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number format of the forward pass")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about a third slower")
    loss_chunk_size: Count = Field(4096, description="tokens per chunk of the loss; bounds the memory of logits")
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] | None = Field(
        None, description="how transformers computes experts; null: what suits the device"
    )
    num_threads: Count | None = Field(None, description="CPU threads; null: torch's own choice")

    logging_steps: Count = Field(10, description="steps between progress reports and lines of metrics.jsonl")
    save_steps: Count = Field(500, description="steps between train states, for resuming; the last step saves one too")
    save_total_limit: Count = Field(2, description="train states kept")
    save_dtype: Literal["source", "float32", "bfloat16"] = Field(
        "source", description="number format of the checkpoint written; source: each tensor as in base_model"
    )
    resume_from_checkpoint: Text = Field(
        "auto", description="auto: go on from the newest train state in output_dir; never; or a train state's folder"
    )
    diffusion: MidtrainDiffusion = Field(MidtrainDiffusion(), description="the diffusion objective")

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


RecipeT = TypeVar("RecipeT", bound=Recipe)
_STAGES: dict[str, type[Recipe]] = {"convert-init": ConvertInitRecipe, "midtrain": MidtrainRecipe}


def load_recipe(path: Path, model_class: type[RecipeT]) -> RecipeT:
    """Reads and checks a recipe file; nothing else is touched.

    Args:
        path: YAML file.
        model_class: the stage's recipe, such as `MidtrainRecipe`.

    Raises:
        UserError: the file cannot be read, or its contents are wrong; all unknown keys and bad values in one error.
    """
    values, lines, problems = _read_file(path)
    recipe: RecipeT | None = None
    try:
        recipe = model_class.model_validate(values)
    except ValidationError as error:
        problems += _problems(error, model_class, lines)
    if problems or recipe is None:
        stage = next(name for name, kind in _STAGES.items() if kind is model_class)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(
            f"{path} is not a valid {stage} recipe: {count}",
            found="\n".join(f"- {problem.sentence}" for problem in sorted(problems, key=lambda problem: problem.line)),
            fix="correct these; recipes/ has a commented example of each stage",
        )
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with every setting written out; `load_recipe` reads an equal recipe back."""
    return write_yaml(recipe.model_dump(mode="json"))


def _read_file(path: Path) -> tuple[dict[Any, Any], dict[KeyPath, int], list[Problem]]:
    try:
        size = path.stat().st_size
        if path.is_dir() or size > _MAX_RECIPE_BYTES:
            raise UserError(
                f"{path} is not a recipe",
                found="a folder" if path.is_dir() else f"a file of {size:,} bytes",
                expected=f"a YAML file of at most {_MAX_RECIPE_BYTES:,} bytes",
                fix="give the path of a recipe, such as recipes/quickstart/midtrain.yaml",
            )
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}", fix="check the path; recipes/ has some to copy") from None
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read", found=error.strerror) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a recipe", found="bytes that are not UTF-8", expected="a YAML file") from None
    except ValueError as error:
        raise UserError(
            f"{path} is not a recipe", found=error, expected="one YAML mapping of `key: value` lines"
        ) from None


def _problems(error: ValidationError, model: type[Recipe], lines: dict[KeyPath, int]) -> Iterator[Problem]:
    """One sentence for each item that pydantic found wrong; a value with several faults is named once."""
    seen: set[KeyPath] = set()
    for item in error.errors(include_url=False):
        path = _key_path(item["loc"], lines, missing=item["type"] == "missing")
        if path in seen:
            continue
        seen.add(path)
        line = lines.get(path, 0)
        name = dotted(path) + (f" (line {line})" if line else "")
        if item["type"] == "extra_forbidden":
            yield Problem(line, f"{name} is not a known key{_suggestion(path, model, lines)}")
        elif item["type"] == "missing":
            yield Problem(line, f"{name} is missing{_described(path, model)}")
        else:
            reason = str(item["ctx"]["error"]) if item["type"] == "value_error" else _expected(item, path)
            yield Problem(line, f"{name} is {_as_written(item['input'])}: {reason}" if line else f"{name}: {reason}")


def _as_written(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _key_path(loc: tuple[str | int, ...], lines: dict[KeyPath, int], *, missing: bool) -> KeyPath:
    """The key that an error is about: pydantic adds names of union members behind it, and names aliases' fields."""
    path = tuple(loc)
    if missing:
        return path
    while len(path) > 1 and path not in lines and path[:-1] in lines:
        path = path[:-1]
    return path


def _expected(item: Any, path: KeyPath) -> str:
    """What was expected there, in words (pydantic's own say "Input should be …")."""
    words = {
        "string_pattern_mismatch": "expected mean, zero, random or copy:<token>",
        "string_type": "expected text; put it in quotes if it is meant so",
        "string_too_short": "expected text",
        "int_type": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "finite_number": "expected a finite number",
        "model_type": "expected a section of `key: value` lines",
        "list_type": "expected a list",
        "too_short": "expected at least one entry",
    }
    if path[-1] == "mask_token":
        return "expected the token's text or its id"
    message = str(item["msg"])
    return words.get(item["type"], message.replace("Input should be", "expected", 1))


def _suggestion(path: KeyPath, model: type[Recipe], lines: dict[KeyPath, int]) -> str:
    name = str(path[-1])
    if name == "block_length" and (*path[:-1], "block_size") in lines:
        return " beside block_size, which says the same: keep block_size"
    section = _section(model, path[:-1])
    known = list(section.model_fields) if section else []
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f", did you mean {near[0]}?"
    places = [dotted(place) for place in _all_keys(model) if place[-1] == name]
    if places:
        return f" here, it belongs at {places[0]}"
    stages = [stage for stage, other in _STAGES.items() if any(place[-1] == name for place in _all_keys(other))]
    if stages:
        return f" here, it belongs to a {stages[0]} recipe"
    near = difflib.get_close_matches(name, [str(place[-1]) for place in _all_keys(model)], n=1)
    return f", did you mean {near[0]}?" if near else ""


def _described(path: KeyPath, model: type[Recipe]) -> str:
    section = _section(model, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    return f" ({field.description})" if field else ""


def _section(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model class of the section at `path`, through lists."""
    for part in path:
        if isinstance(part, str):
            inner = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
            if inner is None:
                return None
            model = inner
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _all_keys(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, (*prefix, name))
