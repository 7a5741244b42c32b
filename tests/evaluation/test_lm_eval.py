"""lm_eval's own tasks through the adapter: the same scores as its Hugging Face model where both decode alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import make_checkpoint
from tests.commands import run_command
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve

pytest.importorskip("lm_eval", reason="needs zconvert[lm-eval]")
pytestmark = pytest.mark.slow

# gsm8k.yaml of lm_eval 0.4.13, but for where its rows are, fewer examples and a shorter answer.
GSM8K = """
task: local_gsm8k
dataset_path: json
dataset_kwargs:
  data_files: {train: ROWS, test: ROWS}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
generation_kwargs:
  until: ["Question:", "</s>", "<|im_end|>", "zq"]
  do_sample: false
  temperature: 0.0
  max_gen_toks: 24
repeats: 1
num_fewshot: 1
filter_list:
  - name: "flexible-extract"
    filter:
      - function: "regex"
        group_select: -1
        regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"
      - function: "take_first"
"""
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: ROWS}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: ["ten", "seven", "the old stone"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = resolve(make_checkpoint(folder / "source", "qwen3_moe", dtype="float32"))
    convert_init(source, folder / "init", block_size=4)
    words = ("men", "ten tall trees", "seven tents there", "an old stone", "a song", "the rest of them")
    rows = [{"question": f"how many {word}", "answer": f"so it is\n#### {n}{n}"} for n, word in enumerate(words)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("gsm8k", GSM8K), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", str(folder / "rows.jsonl")))
    return folder


def evaluated(folder: Path, task: str, model: str, **arguments: Any) -> tuple[dict[str, Any], list[Any]]:
    """Scores and answers of a task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import zconvert.evaluation.lm_eval_model  # noqa: F401  # registers the model

    found = simple_evaluate(
        model,
        {"pretrained": str(folder / "init"), "dtype": "float32", "device": "cpu", **arguments},
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    answers = [[str(answer) for answer in sample["resps"]] for sample in found["samples"][task]]
    return found["results"][task], answers


@pytest.mark.parametrize("sampler", ["ar", "lossless"])
def test_gsm8k_has_the_score_and_texts_of_the_stock_model(folder: Path, sampler: str) -> None:
    stock = evaluated(folder, "local_gsm8k", "hf")
    assert evaluated(folder, "local_gsm8k", "zconvert", sampler=sampler) == stock
    assert all(answer for (answer,) in stock[1])


def test_likelihoods_are_those_of_the_stock_model(folder: Path) -> None:
    assert evaluated(folder, "local_choice", "zconvert") == evaluated(folder, "local_choice", "hf")


def test_the_command_runs_lm_eval_s_own(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = f"--model_args pretrained={folder / 'init'},sampler=mix:0.5 --tasks local_choice --include_path {folder}"
    done = run_command("lm-eval", "run", "--model", "zconvert", *options.split())
    assert done.exit_code == 0, done.stderr
    assert "|local_choice|" in done.stdout + capfd.readouterr().out


def test_options_that_are_not_known_are_refused(folder: Path) -> None:
    from zconvert.evaluation.lm_eval_model import ZconvertLM

    model = ZconvertLM(str(folder / "init"), sampler="mix:0.5", dtype="float32", device="cpu")
    assert model._sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9}).temperature == 0.7
    assert model._sampling({"do_sample": False, "temperature": 0.7}).greedy
    assert model._sampling({}).mix_weight == 0.5
    with pytest.raises(ValueError, match="num_beams"):
        model._sampling({"num_beams": 4})
