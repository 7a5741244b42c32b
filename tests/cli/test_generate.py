"""`zconvert generate`: text on stdout, the tally on stderr, and mistakes told before the weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import make_checkpoint
from tests.commands import run_command
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model, prompt_ids
from zconvert.checkpoint.source import resolve
from zconvert.cli.streaming import Tally
from zconvert.cli.ui import safe
from zconvert.errors import UserError

PROMPT = "ten tall trees"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = make_checkpoint(folder / "mixtral", "mixtral", dtype="float32")
    convert_init(resolve(source), folder / "converted", block_size=4)
    return folder / "converted"


run = partial(run_command, "generate")


def document(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_greedy_text_is_that_of_transformers_and_nothing_else_is_on_stdout(checkpoint: Path) -> None:
    import torch

    model, tokenizer = load_model(resolve(checkpoint))
    ids = torch.tensor([prompt_ids(tokenizer, PROMPT)])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0].tolist()
    whole = tokenizer.decode(text, skip_special_tokens=True)
    for sampler in ("lossless", "ar"):
        result = run(checkpoint, PROMPT, "--sampler", sampler, "--max-new-tokens", 12)
        assert result.exit_code == 0, result.output
        assert PROMPT + result.stdout.rstrip("\n") == whole
        assert " forwards (" in result.stderr
        assert "tokens/s" in result.stderr


def test_an_untrained_checkpoint_says_so_unless_it_is_not_to_draft(checkpoint: Path) -> None:
    assert "Not trained yet" in run(checkpoint, PROMPT, "--max-new-tokens", 2).stderr
    assert "Not trained yet" not in run(checkpoint, PROMPT, "--max-new-tokens", 2, "--sampler", "ar").stderr


def test_json_is_one_document_with_text_and_tally(checkpoint: Path) -> None:
    told = document(checkpoint, PROMPT, "--sampler", "ar")
    assert (told["prompt"], told["sampler"], told["tokens"]) == (PROMPT, "ar", told["forwards"])
    assert told["tokens_per_forward"] == 1
    assert told["tokens_per_second"] > 0
    assert told["text"] == document(checkpoint, "--prompt", PROMPT)["text"]


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_text(checkpoint: Path) -> None:
    expected = run(checkpoint, PROMPT, "--max-new-tokens", 12)
    compiled = run(checkpoint, PROMPT, "--max-new-tokens", 12, "--compile", "default")
    assert compiled.exit_code == 0, compiled.output
    assert compiled.stdout == expected.stdout
    assert "Dynamo" not in compiled.stderr


def test_what_changes_as_it_goes_is_not_compiled(checkpoint: Path) -> None:
    result = run(checkpoint, PROMPT, "--compile", "default", "--mode", "auto")
    assert result.exit_code == 2
    assert "bench --tune" in result.output


def test_the_prompt_may_come_from_stdin(checkpoint: Path) -> None:
    expected = run(checkpoint, PROMPT, "--max-new-tokens", 5).stdout
    assert run(checkpoint, "--max-new-tokens", 5, stdin=PROMPT).stdout == expected
    assert run(checkpoint, "-", "--max-new-tokens", 5, stdin=PROMPT).stdout == expected


def test_sampling_follows_the_seed(checkpoint: Path) -> None:
    def sampled(seed: int) -> str:
        return document(checkpoint, PROMPT, "--temperature", 2, "--seed", seed, "--sampler", "mixed")["text"]

    assert sampled(1) == sampled(1) != sampled(2)


def test_blocks_are_shown_with_the_same_text(checkpoint: Path) -> None:
    plain = run(checkpoint, PROMPT, "--max-new-tokens", 12)
    blocks = run(checkpoint, PROMPT, "--max-new-tokens", 12, "--show-blocks")
    assert blocks.exit_code == 0, blocks.output
    assert blocks.stdout == plain.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--proposals", "1,9"), "found: 9 expected: at most 4"),
        (("--block-size", "8"), "found: 8 expected: at most 4"),
        (("--mode", "two", "--proposals", "3"), "with two forwards"),
    ],
)
def test_options_that_cannot_work_are_a_users_error(checkpoint: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(checkpoint, PROMPT, *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--proposals", "many"), "no list of accepted counts"),
        (("--mix-weight", "0.5"), "--mix-weight: it goes with --sampler mixed"),
        (("--top-p", "0"), "--top-p: it is 0.0, expected more than 0"),
        (("--min-p", "2"), "--min-p: it is 2"),
        (("--repetition-penalty", "0"), "--repetition-penalty: it is 0"),
        (("--block-size", "4", "--proposals", "1,5"), "from 1 to 4"),
        (("--prompt", "again"), "given twice"),
        (("--json", "--show-blocks"), "leave one of them out"),
        (("--dtype", "float8"), "'float8'"),
        (("--mode", "three"), "'three'"),
        (("--stop", ""), "it is empty"),
        (("--prompts", "a.jsonl", "--out", "b.jsonl"), "give one of them"),
        (("--chat",), "give one of them"),
    ],
)
def test_a_mistake_in_the_command_line_is_a_usage_error(
    checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(checkpoint, PROMPT, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "a.jsonl"), "go together"),
        (("--out", "b.jsonl"), "go together"),
        (("--prompts", "a.jsonl", "--out", "b.jsonl", "--chat"), "give one of them"),
        (("--prompts", "a.jsonl", "--out", "b.jsonl", "--show-blocks"), "no meaning with --prompts"),
        (("--chat", "--json"), "no meaning with --chat"),
    ],
)
def test_uses_that_exclude_each_other_are_a_usage_error(
    checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(checkpoint, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())


def test_both_modes_give_the_same_greedy_text(checkpoint: Path) -> None:
    assert document(checkpoint, PROMPT, "--mode", "two")["text"] == document(checkpoint, PROMPT)["text"]


def test_text_ends_before_a_stop_string(checkpoint: Path) -> None:
    whole = document(checkpoint, PROMPT)
    assert whole["finish"] == "length"
    stop = whole["text"][3:5]
    cut = document(checkpoint, PROMPT, "--stop", "nowhere", "--stop", stop)
    assert (cut["text"], cut["finish"]) == (whole["text"][: whole["text"].index(stop)], "stop")
    plain = run(checkpoint, PROMPT, "--max-new-tokens", 12, "--stop", stop)
    assert plain.stdout == cut["text"] + "\n"


def test_sampling_may_be_narrowed(checkpoint: Path) -> None:
    wide = document(checkpoint, PROMPT, "--temperature", 2, "--seed", 1)["text"]
    assert document(checkpoint, PROMPT, "--temperature", 2, "--seed", 1, "--min-p", 1)["text"] != wide
    assert document(checkpoint, PROMPT, "--repetition-penalty", 5)["text"] != document(checkpoint, PROMPT)["text"]


def test_a_file_of_prompts_becomes_a_file_of_texts_and_is_completed_when_run_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "sing", "seven men")))
    arguments = (checkpoint, "--prompts", prompts, "--out", output, "--max-new-tokens", 12, "--batch-size", 2)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "3 texts in" in result.stderr
    rows = {row["index"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert rows[0]["text"] == document(checkpoint, PROMPT)["text"]
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[1][:9])
    result = run(*arguments)
    assert "1 text of an earlier run kept" in result.stderr
    assert {row["index"]: row for row in map(json.loads, output.read_text().splitlines())} == rows


def test_a_bad_row_of_a_file_of_prompts_is_told_before_the_weights_are_read(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    result = run(checkpoint, "--prompts", prompts, "--out", tmp_path / "texts.jsonl")
    assert result.exit_code == 1
    assert "line 2 is no row of prompts" in " ".join(result.stderr.split())
    assert not (tmp_path / "texts.jsonl").exists()


def test_an_empty_prompt_needs_a_bos_token(checkpoint: Path) -> None:
    assert run(checkpoint, "", "--max-new-tokens", 2).exit_code == 0
    result = run(checkpoint, "", "--no-add-bos")
    assert result.exit_code == 1
    assert "the prompt is empty" in result.stderr


def test_what_is_not_converted_is_refused(checkpoint: Path) -> None:
    result = run(checkpoint.parent / "mixtral", PROMPT)
    assert result.exit_code == 1
    assert "is not converted" in result.stderr


def test_missing_weights_are_not_made_up(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "larger"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="do not fit"):
        load_model(resolve(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load_model(resolve(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: _rename_the_mask(folder / "tokenizer.json"), "not the one that the checkpoint was converted"),
        (lambda folder: _cut(folder / "model.safetensors", 1000), "truncated"),
    ],
    ids=["no tokenizer", "another tokenizer", "truncated weights"],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_made_up(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    result = run(folder, PROMPT)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def _rename_the_mask(path: Path) -> None:
    path.write_text(path.read_text().replace("<mask>", "<musk>"))


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def test_the_dtype_is_as_asked_and_a_device_that_is_not_there_is_refused(checkpoint: Path) -> None:
    import torch

    assert load_model(resolve(checkpoint), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            load_model(resolve(checkpoint), device="cuda")
    with pytest.raises(UserError, match="no such device"):
        load_model(resolve(checkpoint), device="abacus")
    with pytest.raises(UserError, match="no such dtype"):
        load_model(resolve(checkpoint), dtype="float3")


def test_the_prefill_does_not_count_among_the_forwards_of_a_ratio() -> None:
    tally = Tally()
    assert tally.tokens_per_forward is None
    tally.tokens, tally.forwards, tally.seconds = 9, 5, 2.0
    assert tally.tokens_per_forward == 2.0
    assert str(tally) == "9 tokens in 5 forwards (2.00 tokens each after the prefill), 4.5 tokens/s"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert safe("a\x1b[31m\tb\n") == "a\N{REPLACEMENT CHARACTER}[31m\tb\n"
