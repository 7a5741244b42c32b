"""Text that the checkpoint writes: its own tokens, the same after a kill, and made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.tiny import make_checkpoint
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import resolve
from zconvert.data.loading import load_stream
from zconvert.data.self_generated import Writer
from zconvert.data.streams import Shuffled
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe

PROMPTS = ["the tree", "ten men", "seven", "and then", "the old stone", "they rest", "ten", "sing to the old stone"]
EOS, BOS, BANNED = 1, 2, 20


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = make_checkpoint(tmp_path_factory.mktemp("source") / "zaya", "zaya", dtype="float32")
    model, tokenizer = load_model(resolve(folder), dtype="float32", device="cpu")
    # What a checkpoint's own settings would change of its distribution must not come through.
    model.generation_config.update(top_k=2, repetition_penalty=50.0, do_sample=True)
    model.config.use_cache = False
    return model, tokenizer


def recipe_of(
    folder: Path, prompts: list[Any] = PROMPTS, type: str = "text", field: str = "text", **settings: Any
) -> MidtrainRecipe:
    folder.mkdir(exist_ok=True)
    rows = [{"text": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generated = {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 6, "batch_size": 2, **settings}
    return MidtrainRecipe.model_validate(
        {
            "base_model": "x",
            "output_dir": str(folder / "run"),
            "max_steps": 1,
            "datasets": [{"self_generated": generated, "type": type, "field": field}],
        }
    )


def documents(
    recipe: MidtrainRecipe, loaded: tuple[Any, Any], model: Any = None, fingerprint: str = "one"
) -> list[tuple[list[int], list[bool]]]:
    def load() -> Any:
        return loaded[0] if model is None else model

    writer = Writer(load, fingerprint, frozenset({EOS}), frozenset({BANNED}))
    stream = load_stream(recipe, loaded[1], vocabulary_rows=64, writer=writer)
    assert isinstance(stream, Shuffled)
    (part,) = stream.parts
    return [(ids.tolist(), scored.tolist()) for ids, scored in map(part.tokens, range(len(part)))]


class Killed(BaseException):
    """As Ctrl-C would be, but it does not end the tests."""


class Dying:
    """A model that dies after some batches, as a killed process would."""

    def __init__(self, model: Any, batches: int) -> None:
        self.model, self.left, self.device = model, batches, model.device
        self.generation_config = model.generation_config

    def generate(self, *arguments: Any, **options: Any) -> Any:
        if not self.left:
            raise Killed
        self.left -= 1
        own, self.model.generation_config = self.model.generation_config, self.generation_config
        try:
            return self.model.generate(*arguments, **options)
        finally:
            self.model.generation_config = own


class Never:
    device = torch.device("cpu")
    generation_config = None

    def generate(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("nothing is missing")


def test_greedy_text_is_the_models_own_after_each_prompt_and_only_it_is_scored(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    found = documents(recipe_of(tmp_path, temperature=0.0), loaded)
    for prompt, (ids, scored) in zip(PROMPTS, found, strict=True):
        start = [BOS, *tokenizer(prompt, add_special_tokens=False).input_ids]
        expected = list(start)
        while len(expected) < len(start) + 6 and expected[-1] != EOS:
            logits = model(torch.tensor([expected])).logits[0, -1]
            logits[BANNED] = -torch.inf
            expected.append(int(logits.argmax()))
        assert ids == expected
        assert scored == [False] * len(start) + [True] * (len(ids) - len(start))


def test_prompts_are_read_as_generate_reads_them_unless_the_recipe_names_another_field(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": "ten men", "text": "the tree", "question": "seven"}, {"prompt": None, "text": "the tree"}]

    def starts(recipe: MidtrainRecipe) -> list[str]:
        found = documents(recipe, loaded)
        return [loaded[1].decode([i for i, scored in zip(*each, strict=True) if not scored][1:]) for each in found]

    assert starts(recipe_of(tmp_path / "a", rows)) == ["ten men", "the tree"]
    assert starts(recipe_of(tmp_path / "b", rows[:1], field="question")) == ["seven"]


def test_samples_follow_the_models_distribution_untouched_by_its_generation_config(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    count = 600
    found = documents(
        recipe_of(tmp_path, ["ten men"], samples_per_prompt=count, max_new_tokens=1, batch_size=100), loaded
    )
    drawn = torch.tensor([ids[-1] for ids, _ in found])
    logits = loaded[0](torch.tensor([found[0][0][:-1]])).logits[0, -1].detach()
    logits[BANNED] = -torch.inf
    expected = logits.softmax(-1)
    seen = torch.bincount(drawn, minlength=len(expected)) / count
    assert len(found) == count
    assert (seen - expected).abs().max() < 0.05  # more than 3 standard deviations; the seed is fixed
    assert seen[BANNED] == 0


@pytest.mark.parametrize("died_after", [0, 1, 5])
def test_a_generation_killed_in_the_middle_ends_with_the_same_text(
    died_after: int, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    settings = {"samples_per_prompt": 2, "seed": 4}
    counted = Dying(loaded[0], 100)
    expected = documents(recipe_of(tmp_path / "whole", **settings), loaded, counted)
    batches = 100 - counted.left
    recipe = recipe_of(tmp_path / "killed", **settings)
    with pytest.raises(Killed):
        documents(recipe, loaded, Dying(loaded[0], died_after))
    prepared = tmp_path / "killed" / "run" / "prepared"
    if died_after:
        (partial,) = prepared.glob("*.generated.jsonl")
        whole = partial.read_bytes()
        assert whole.count(b"\n") == died_after
        partial.write_bytes(whole + whole[: len(whole) // died_after // 2])  # the power went in the middle of a line
    torch.manual_seed(99)  # what else was drawn meanwhile does not matter
    with pytest.raises(Killed):
        documents(recipe, loaded, Dying(loaded[0], 1))
    left = Dying(loaded[0], batches - died_after - 1)  # what was finished, both times, is not made again
    assert documents(recipe, loaded, left) == expected
    assert left.generation_config.top_k == 2
    assert not list(prepared.glob("*.jsonl"))


def test_text_is_made_once_and_anew_where_anything_changes(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    first = documents(recipe_of(tmp_path), loaded)
    assert documents(recipe_of(tmp_path), loaded, Never()) == first
    for changed in ({"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 7}, {"prompts": PROMPTS[:-1]}):
        with pytest.raises(AssertionError, match="nothing is missing"):
            documents(recipe_of(tmp_path, **changed), loaded, Never())
    with pytest.raises(AssertionError, match="nothing is missing"):
        documents(recipe_of(tmp_path), loaded, Never(), fingerprint="another checkpoint")


def test_text_does_not_depend_on_what_else_is_drawn_at_random_and_leaves_no_trace(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = documents(recipe_of(tmp_path / "a"), loaded)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert documents(recipe_of(tmp_path / "b"), loaded) == first


def test_prompts_can_be_conversations_and_be_trained_on(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = loaded[1]
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    row = {"messages": [{"role": "user", "content": "ten men"}, {"role": "assistant", "content": "left out"}]}
    recipe = recipe_of(tmp_path, [row], type="chat", train_on_prompts=True)
    recipe = recipe.model_copy(update={"chat_template": str(tmp_path / "chat.jinja")})
    ((ids, scored),) = documents(recipe, loaded)
    start = [*tokenizer("ten men", add_special_tokens=False).input_ids, EOS]
    assert ids[: len(start)] == start
    assert scored == [False] + [True] * (len(ids) - 1)


def test_no_prompts_are_a_clear_error(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompts"):
        documents(recipe_of(tmp_path, []), loaded)
    with pytest.raises(UserError, match=r"line 1 of .*prompts\.jsonl lacks 'prompt' and 'text'"):
        documents(recipe_of(tmp_path, [{"body": "x"}]), loaded)
