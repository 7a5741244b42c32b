"""What users of transformers pass to `generate` and to pipelines, from an exported folder without zconvert.

One process of the bare environment runs every case with the folder's code and without it; each is a test here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_export_elsewhere import bare_python, quickstart
from tests.environments import run_in

__all__ = ["bare_python", "quickstart"]  # fixtures

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria, TextStreamer, pipeline

name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
load = dict(dtype=torch.float32)
plain = AutoModelForCausalLM.from_pretrained(name, **load).eval()
tidar = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **load).eval()
one = tokenizer(["Mia has 12 apples."], return_tensors="pt")
many = tokenizer(["Mia has 12 apples.", "Tom", "Ann has 3 pens. She gets 4 more"], return_tensors="pt", padding=True)
text = plain.generate(**one, max_new_tokens=30, do_sample=False)[0]
word = tokenizer.decode(text[one["input_ids"].shape[1] + 6 :][:4])
ends = [int(text[-12]), int(text[-5])]


class Stop(StoppingCriteria):
    def __call__(self, ids, scores, **_):
        return torch.full((ids.shape[0],), ids.shape[1] >= one["input_ids"].shape[1] + 9)


class Streamer(TextStreamer):
    def __init__(self):
        super().__init__(tokenizer)
        self.got = ""

    def on_finalized_text(self, text, stream_end=False):
        self.got += text


same = {
    "max_new_tokens": (one, dict(max_new_tokens=20)),
    "max_length": (one, dict(max_length=one["input_ids"].shape[1] + 13)),
    "left padding": (many, dict(max_new_tokens=20)),
    "several end tokens": (many, dict(max_new_tokens=30, eos_token_id=ends)),
    "repetition_penalty": (many, dict(max_new_tokens=20, repetition_penalty=1.3)),
    "stopping_criteria": (one, dict(max_new_tokens=20, stopping_criteria=[Stop()])),
    "stop_strings": (one, dict(max_new_tokens=30, stop_strings=[word], tokenizer=tokenizer)),
    "generation_config": (one, dict(generation_config=GenerationConfig(max_new_tokens=17, do_sample=False))),
}
answer = {}
for case, (inputs, options) in same.items():
    options.setdefault("do_sample", False)
    texts = [m.generate(**inputs, pad_token_id=0, **options).tolist() for m in (plain, tidar)]
    answer[case] = texts[0] == texts[1] and len(texts[0][0]) > inputs["input_ids"].shape[1]

ours = {
    "sampler mixed": dict(sampler="mixed", mix_weight=0.7),
    "sampler ar": dict(sampler="ar"),
    "proposals": dict(proposals=[1, 3]),
    "block_size": dict(block_size=4),
    "mode two": dict(mode="two"),
}
greedy = plain.generate(**one, max_new_tokens=20, do_sample=False).tolist()
for case, options in ours.items():
    out = tidar.generate(**one, max_new_tokens=20, do_sample=False, **options).tolist()
    answer[case] = len(out[0]) == len(greedy[0]) if case == "sampler mixed" else out == greedy

sampled = dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, num_return_sequences=3, max_new_tokens=12)
first, second = (tidar.generate(**many, seed=3, **sampled) for _ in range(2))
answer["num_return_sequences, sampled"] = first.shape[0] == 9 and torch.equal(first, second)
answer["greedy by top_k 1"] = (
    tidar.generate(**one, do_sample=True, top_k=1, max_new_tokens=20).tolist() == greedy
)
out = tidar.generate(**one, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
answer["return_dict_in_generate"] = out.sequences.tolist() == greedy
streamer = Streamer()
tidar.generate(**one, max_new_tokens=20, do_sample=False, streamer=streamer)
answer["streamer"] = streamer.got.strip() == tokenizer.decode(greedy[0]).strip()
texts = [
    pipeline("text-generation", model=m, tokenizer=tokenizer)("Mia has 12 apples.", max_new_tokens=20, do_sample=False)
    for m in (plain, tidar)
]
answer["pipeline"] = texts[0] == texts[1]
by_name = pipeline("text-generation", model=name, trust_remote_code=True, dtype=torch.float32)
answer["pipeline by name"] = by_name("Mia has 12 apples.", max_new_tokens=20, do_sample=False) == texts[0]
half = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.bfloat16).eval()
out = half.generate(**one, max_new_tokens=8, do_sample=False)
answer["bfloat16"] = half.dtype == torch.bfloat16 and out.shape[1] > one["input_ids"].shape[1]
for case, options in {"beam search": dict(num_beams=3), "assisted": dict(assistant_model=plain)}.items():
    try:
        tidar.generate(**one, max_new_tokens=4, **options)
        answer[f"{case} is refused"] = False
    except ValueError as error:
        answer[f"{case} is refused"] = "cannot honour " + next(iter(options)) in str(error)
print(json.dumps(answer))
"""
CASES = (
    "max_new_tokens",
    "max_length",
    "left padding",
    "several end tokens",
    "repetition_penalty",
    "stopping_criteria",
    "stop_strings",
    "generation_config",
    "sampler mixed",
    "sampler ar",
    "proposals",
    "block_size",
    "mode two",
    "num_return_sequences, sampled",
    "greedy by top_k 1",
    "return_dict_in_generate",
    "streamer",
    "pipeline",
    "pipeline by name",
    "bfloat16",
    "beam search is refused",
    "assisted is refused",
)


@pytest.fixture(scope="module")
def answers(bare_python: Path, quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_in(bare_python, SCRIPT, quickstart, home=tmp_path_factory.mktemp("home"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_generate_from_an_export_does_what_stock_generation_does(answers: dict[str, Any], case: str) -> None:
    assert answers[case] is True


@pytest.mark.slow
def test_every_case_that_ran_is_a_test(answers: dict[str, Any]) -> None:
    assert sorted(answers) == sorted(CASES)
