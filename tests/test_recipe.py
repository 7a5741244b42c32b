"""Recipes: what is read, and that every mistake in one is told at once, by its name and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from zconvert.errors import UserError
from zconvert.recipe import (
    BY_STAGE,
    ConvertInitRecipe,
    DatasetRecipe,
    MidtrainRecipe,
    PipelineRecipe,
    Recipe,
    SftRecipe,
    dump_recipe,
    load_recipe,
)
from zconvert.recipe.yaml_text import write_yaml

MIDTRAIN = "base_model: source\noutput_dir: out\nmax_steps: 100\ndatasets:\n  - path: train.jsonl\n"
CONVERT = "base_model: source\noutput_dir: out\n"


def load(tmp_path: Path, text: str, kind: type[Recipe] = MidtrainRecipe) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, kind)


def problems(tmp_path: Path, text: str, kind: type[Recipe] = MidtrainRecipe) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, kind)
    return [line.removeprefix("- ") for line in str(caught.value.found).splitlines()]


def test_the_shortest_recipes_get_the_defaults(tmp_path: Path) -> None:
    midtrain = load(tmp_path, MIDTRAIN)
    assert (midtrain.seed, midtrain.lr_scheduler, midtrain.resume_from_checkpoint) == (0, "cosine", "auto")
    assert midtrain.datasets[0] == DatasetRecipe(path="train.jsonl")
    assert midtrain.diffusion.alpha == 1.0
    convert = load(tmp_path, CONVERT, ConvertInitRecipe)
    assert (convert.diffusion.block_size, convert.diffusion.mask_init) == (16, "mean")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".1e-2", "10.0e-4", "0.001"])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, MIDTRAIN + f"learning_rate: {text}\n").learning_rate == pytest.approx(1e-3)


def test_a_whole_number_will_do_for_a_rate(tmp_path: Path) -> None:
    assert load(tmp_path, MIDTRAIN + "max_grad_norm: 2\n").max_grad_norm == 2.0


def test_block_length_is_read_as_block_size(tmp_path: Path) -> None:
    recipe = load(tmp_path, CONVERT + "diffusion: {block_length: 8}\n", ConvertInitRecipe)
    assert recipe.diffusion.block_size == 8


def test_block_length_beside_block_size_is_an_error(tmp_path: Path) -> None:
    text = CONVERT + "diffusion: {block_length: 8, block_size: 8}\n"
    assert "keep block_size" in problems(tmp_path, text, ConvertInitRecipe)[0]


@pytest.mark.parametrize(("text", "value"), [("4", 4), ("<mask>", "<mask>"), ("'4'", "4"), ("null", None)])
def test_a_mask_token_is_given_by_text_or_id(tmp_path: Path, text: str, value: object) -> None:
    recipe = load(tmp_path, CONVERT + f"diffusion:\n  mask_token: {text}\n", ConvertInitRecipe)
    assert recipe.diffusion.mask_token == value


def test_proposals_are_sorted_and_lose_their_repeats(tmp_path: Path) -> None:
    recipe = load(tmp_path, CONVERT + "diffusion: {proposals: [5, 1, 3, 1]}\n", ConvertInitRecipe)
    assert recipe.diffusion.proposals == [1, 3, 5]


def test_every_mistake_is_told_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = (
        "base_model: source\noutput_dir: 12\nmax_step: 10\nlearning_rate: fast\nlearning_rate: 1e-5\n"
        "lr_scheduler: cosin\ndatasets:\n  - path: a\n    feild: x\n  - b\n"
        "diffusion:\n  alpha: yes\n  block_offset: 0\n"
    )
    found = problems(tmp_path, text)
    assert [re.sub(r": .*|, did.*| \(opt.*", "", line) for line in found] == [
        "max_steps is missing",
        "output_dir (line 2) is 12",
        "max_step (line 3) is not a known key",
        "learning_rate (line 4) is 'fast'",
        "learning_rate (line 5) stands there twice, first on line 4",
        "lr_scheduler (line 6) is 'cosin'",
        "datasets[0].feild (line 9) is not a known key",
        "datasets[1] (line 10) is 'b'",
        "diffusion.alpha (line 12) is true",
        "diffusion.block_offset (line 13) is 0",
    ]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("micro_batchsize: 4", "did you mean micro_batch_size?"),
        ("alpha: 1.0", "it belongs at diffusion.alpha"),
        ("path: x", "it belongs at datasets.path"),
        ("mask_init: mean", "it belongs to a convert-init recipe"),
        ("diffusion: {block_ofset: zero}", "did you mean block_offset?"),
        ("xyzzy: 1", "is not a known key"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_name_or_place(tmp_path: Path, line: str, hint: str) -> None:
    (found,) = problems(tmp_path, MIDTRAIN + line + "\n")
    assert hint in found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: '1e-5'", "expected a number"),
        ("learning_rate: .nan", "expected a finite number"),
        ("learning_rate: -1e-5", "expected greater than 0"),
        ("micro_batch_size: 0", "expected greater than or equal to 1"),
        ("micro_batch_size: 1.5", "expected a whole number"),
        ("micro_batch_size: true", "expected a whole number"),
        ("sample_packing: 1", "expected true or false"),
        ("save_dtype: fp16", "expected 'source', 'float32' or 'bfloat16'"),
        ("revision: 1e5", "put it in quotes"),
        ("diffusion:", "expected a section"),
        ("datasets_: 1", "did you mean datasets?"),
        ("warmup_steps: 101", "expected at most max_steps, 100"),
        ("decay_steps: 10", "expected 0, since lr_scheduler is cosine"),
        ("lr_scheduler: wsd", "expected at least 1, since lr_scheduler is wsd"),
        ("{lr_scheduler: wsd, warmup_steps: 50, decay_steps: 51}", "expected at most max_steps − warmup_steps, 50"),
    ],
)
def test_a_bad_value_is_shown_with_what_was_expected(tmp_path: Path, line: str, expected: str) -> None:
    (found,) = problems(tmp_path, MIDTRAIN + line.strip("{}").replace(", ", "\n") + "\n")
    assert expected in found


def test_rules_across_keys_are_told_together_with_other_mistakes(tmp_path: Path) -> None:
    found = problems(tmp_path, MIDTRAIN + "warmup_steps: 500\nsave_stepz: 1\n")
    assert len(found) == 2


@pytest.mark.parametrize("init", ["median", "copy:", "copy", "Mean", "mean "])
def test_an_unknown_mask_init_is_refused(tmp_path: Path, init: str) -> None:
    found = problems(tmp_path, CONVERT + f"diffusion:\n  mask_init: '{init}'\n", ConvertInitRecipe)
    assert "expected mean, zero, random or copy:<token>" in found[0]


def test_proposals_beyond_the_block_are_refused(tmp_path: Path) -> None:
    text = CONVERT + "diffusion: {block_size: 4, proposals: [1, 5]}\n"
    assert "accepted counts from 1 to 4" in problems(tmp_path, text, ConvertInitRecipe)[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just words",
        "- a\n- b",
        "a: [1, 2",
        "a: 1\n\tb: 2",
        "a: !!python/object/apply:os.system ['true']",
        "a: &x [1]\nb: *x",
        "a: 1\n---\nb: 2",
        "[1]: 2",
        "a: " + "[" * 5000,
        "a: 2024-13-45",
        "a: \x00",
        r'"\uD800": 1',
        r'a: ["\uDFFF"]',
    ],
)
def test_a_file_that_is_no_plain_yaml_mapping_is_one_clear_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is not a recipe"):
        load(tmp_path, text)


def test_files_that_are_no_recipes_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no recipe"):
        load_recipe(tmp_path / "missing.yaml", MidtrainRecipe)
    with pytest.raises(UserError, match="is not a recipe"):
        load_recipe(tmp_path, MidtrainRecipe)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match="UTF-8") as caught:
        load_recipe(tmp_path / "bytes.yaml", MidtrainRecipe)
    assert caught.value.expected == "a YAML file"
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(10**12)  # sparse: reading it would take all memory
    with pytest.raises(UserError, match="is not a recipe"):
        load_recipe(tmp_path / "huge.yaml", MidtrainRecipe)


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = MidtrainRecipe(
        base_model="1e5",
        revision="2024-01-01",
        output_dir="öut: #1",
        max_steps=7,
        learning_rate=1e-5,
        datasets=[DatasetRecipe(path="a", field="no"), DatasetRecipe(path="~", add_eos=False)],
    )
    assert load(tmp_path, dump_recipe(recipe)) == recipe
    convert = ConvertInitRecipe(base_model="x", output_dir="y", diffusion={"mask_token": "4", "proposals": [1, 2]})
    assert load(tmp_path, dump_recipe(convert), ConvertInitRecipe) == convert


def test_every_setting_has_a_description() -> None:
    def fields(model: Any) -> Any:
        for name, field in model.model_fields.items():
            yield model.__name__, name, field
            for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(inner, "model_fields"):
                    yield from fields(inner)

    missing = [(m, n) for kind in (ConvertInitRecipe, MidtrainRecipe) for m, n, f in fields(kind) if not f.description]
    assert not missing


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("  - type: text\n", "datasets[0] (line 5): expected either path or self_generated"),
        ("  - path: a\n    self_generated: {prompts: b}\n", "expected either path or self_generated"),
        ("  - {path: a, weight: 1.0}\n  - path: b\n", "expected a weight for every entry or for none, found 1 of 2"),
        ("  - {path: a, streaming: true}\n  - path: b\n", "since one is streamed and has no known length"),
        ("  - {self_generated: {prompts: b}, streaming: true}\n", "expected false, since self_generated is written"),
        (
            "  - {self_generated: {prompt: b}}\n",
            "datasets[0].self_generated.prompt (line 5) is not a known key, did you",
        ),
        ("  - {path: a, weight: 0.0}\n", "greater than 0"),
    ],
)
def test_datasets_that_cannot_be_mixed_or_found_are_refused(tmp_path: Path, datasets: str, message: str) -> None:
    path = tmp_path / "midtrain.yaml"
    path.write_text("base_model: a\noutput_dir: b\nmax_steps: 1\ndatasets:\n" + datasets)
    with pytest.raises(UserError) as error:
        load_recipe(path, MidtrainRecipe)
    assert message in str(error.value)


def test_a_recipe_for_conversations_needs_some(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    text = "base_model: a\noutput_dir: b\nmax_steps: 1\ndatasets:\n  - {path: x, type: TYPE}\n"
    path.write_text(text.replace("TYPE", "chat"))
    assert load_recipe(path, SftRecipe).datasets[0].roles_to_train == ["assistant"]
    path.write_text(text.replace("TYPE", "text"))
    with pytest.raises(UserError, match="at least one entry with type: chat"):
        load_recipe(path, SftRecipe)


def test_a_file_with_the_recipes_of_all_stages_is_read_by_each_command(tmp_path: Path) -> None:
    path = tmp_path / "zconvert_config.yaml"
    training = {"base_model": "a", "output_dir": "b", "datasets": [{"path": "c"}]}
    stages = [
        {"stage": "convert-init", "recipe": {"base_model": "a", "output_dir": "b"}},
        {"stage": "midtrain", "recipe": {**training, "max_steps": 1}},
        {"stage": "midtrain", "recipe": {**training, "max_steps": 2}},
    ]
    path.write_text(write_yaml(json.loads(json.dumps({"stages": stages}))))
    assert load_recipe(path, ConvertInitRecipe).output_dir == "b"
    assert load_recipe(path, MidtrainRecipe).max_steps == 2
    with pytest.raises(UserError, match="has no recipe of sft"):
        load_recipe(path, SftRecipe)
    path.write_text(write_yaml({"stages": [{"stage": "midtrain", "recipe": {**training, "max_step": 2}}]}))
    with pytest.raises(UserError, match="max_steps") as error:
        load_recipe(path, MidtrainRecipe)
    assert "(line 8)" in str(error.value)


@pytest.mark.parametrize(("file", "stage"), [("midtrain", "run"), ("pipeline", "midtrain"), ("sft", "convert-init")])
def test_a_recipe_of_another_stage_is_told_with_the_command_that_runs_it(file: str, stage: str) -> None:
    path = Path(__file__).parent.parent / "recipes" / "zaya1-8b" / f"{file}.yaml"
    with pytest.raises(UserError, match=f"is a {file} recipe, not a") as refused:
        load_recipe(path, {**BY_STAGE, "run": PipelineRecipe}[stage])
    assert refused.value.fix is not None
    assert f"zconvert {'run' if file == 'pipeline' else file} {path}" in refused.value.fix
