"""The commands that write, each on tiny models: what it needs, how it is called, and what must be there at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.faults import inject
from tests.training.runs import make_run
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.settings import GatedParts
from zconvert.training import stages

TASK = {
    "description": "goes on from a few words",
    "dataset": {"path": "rows.jsonl"},
    "prompt": "{q}",
    "max_new_tokens": 4,
    "answer": {"take": "regex", "pattern": "([a-e])"},
    "check": {"method": "exact", "target": "{a}"},
}
TIMES = re.compile(
    r'"(?:seconds|[a-z_]*tokens_per_second|speedup|created|started|took|files|batch_seconds)": (?:\[[^\]]*\]|[-+.\de]+)'
)


@dataclass(frozen=True)
class Base:
    """Input that commands share and must not touch."""

    folder: Path
    settings: dict[str, Any]
    """of a short run"""

    def path(self, *parts: str) -> str:
        """Of something in it."""
        return str(self.folder.joinpath(*parts))


@dataclass(frozen=True)
class Command:
    """One that writes."""

    arguments: Callable[[Base, Path], list[str]]
    """given the inputs and the folder to write into"""
    finals: tuple[str, ...]
    """what appears whole or not at all, within that folder"""
    grows: tuple[str, ...] = ()
    """what a command adds to as it goes, and goes on with"""
    begin: Callable[[Base, Path], None] = field(default=lambda _base, _work: None)
    """puts earlier results there"""
    again: tuple[str, ...] = ("exists already",)
    """words of a refusal to do it a second time"""


def make_base(folder: Path) -> Base:
    """Makes source, converted checkpoints, a finished run with an evaluation, data, prompts and a task."""
    settings = make_run(folder, max_steps=2, warmup_steps=0, save_steps=1, save_dtype="float32")
    settings["num_threads"] = 1
    run = stages.train(MidtrainRecipe(**settings), lambda _progress: None).parent
    parts = GatedParts(rank=2, mlp_width=8)
    convert_init(resolve(str(folder / "source")), folder / "gated", block_size=4, gated=parts)
    rows = [{"messages": [{"role": "user", "content": "ten"}, {"role": "assistant", "content": "tall trees"}]}] * 8
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "sat on"}\n{"prompt": "the mat"}\n')
    (folder / "rows.jsonl").write_text('{"q": "ten tall", "a": "a"}\n{"q": "seven men", "a": "e"}\n')
    task = {**TASK, "dataset": {"path": str(folder / "rows.jsonl")}}
    (folder / "words.yaml").write_text(yaml.safe_dump(task))
    assert run == folder / "run"
    base = Base(folder, settings)
    done = inject.run(COMMANDS["evaluate"].arguments(base, folder))
    assert done.code == 0, done.stderr
    return base


def _recipe(work: Path, settings: dict[str, Any], **changes: Any) -> str:
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(work / "run"), **changes}))
    return str(path)


def _pipeline(base: Base, work: Path) -> list[str]:
    convert = {"base_model": base.path("source"), "output_dir": str(work / "init"), "diffusion": {"block_size": 4}}
    (work / "convert-init.yaml").write_text(yaml.safe_dump(convert))
    recipe = _recipe(work, base.settings, base_model=str(work / "init"))
    stages = {"convert-init": "convert-init.yaml", "midtrain": recipe, "export": {"output_dir": str(work / "exported")}}
    (work / "pipeline.yaml").write_text(yaml.safe_dump(stages))
    return ["run", str(work / "pipeline.yaml")]


def _sft(base: Base, work: Path) -> list[str]:
    datasets = [{"path": base.path("chat.jsonl"), "type": "chat"}]
    changes = {"datasets": datasets, "chat_template": base.path("chat.jinja"), "sequence_len": 64}
    return ["sft", _recipe(work, base.settings, **changes)]


def _extend(base: Base, work: Path) -> list[str]:
    context = {"target_len": 64, "original_len": 16, "rope_theta": 1e6, "long_share": 0.0}
    return ["extend-context", _recipe(work, base.settings, context=context)]


def _evaluate(base: Base, work: Path) -> list[str]:
    options = ["--samplers", "ar,lossless", "--k", "1", "--device", "cpu", "--temperature", "0"]
    return ["evaluate", base.path("init"), "--tasks", base.path("words.yaml"), "--out", str(work / "told"), *options]


def _decoding(base: Base, tokens: int) -> list[str]:
    return ["--prompts", base.path("prompts.jsonl"), "--max-new-tokens", str(tokens), "--device", "cpu"]


def _begin_texts(_base: Base, work: Path) -> None:
    line = {"index": 1, "prompt": "sat on", "text": " earlier", "finish": "length", "tokens": 1, "forwards": 1}
    (work / "texts.jsonl").write_text(json.dumps(line) + "\n")


RUN = {
    "finals": ("run/checkpoint",),
    "grows": ("run/metrics.jsonl",),
    "again": ("this run is complete",),
}
COMMANDS: dict[str, Command] = {
    "convert-init": Command(
        lambda base, work: ["convert-init", base.path("source"), "--block-size", "4", "--out", str(work / "a/init")],
        ("a/init",),
    ),
    "midtrain": Command(lambda base, work: ["midtrain", _recipe(work, base.settings)], **RUN),  # type: ignore[arg-type]
    "extend-context": Command(_extend, **RUN),  # type: ignore[arg-type]
    "sft": Command(_sft, **RUN),  # type: ignore[arg-type]
    "export": Command(
        lambda base, work: ["export", base.path("run"), "--out", str(work / "exported"), "--no-verify"], ("exported",)
    ),
    "export --merge-to-ar": Command(
        lambda base, work: ["export", base.path("gated"), "--out", str(work / "source"), "--merge-to-ar"], ("source",)
    ),
    "evaluate": Command(_evaluate, ("told/results.json",), ("told/samples",)),
    "score": Command(
        lambda base, work: ["score", str(work / "told")],
        ("told/results.json",),
        begin=lambda base, work: shutil.copytree(base.folder / "told", work / "told") and None,  # type: ignore[func-returns-value]
    ),
    "report": Command(
        lambda base, work: ["report", base.path("run"), "--out", str(work / "page")], ("page/report.html",)
    ),
    "bench --plot": Command(
        lambda base, work: ["bench", base.path("init"), *_decoding(base, 2), "--num-prompts", "1", "--no-stock",
                            "--plot", str(work / "speed.png")],
        ("speed.png",),
    ),
    "plan --heatmap": Command(
        lambda base, work: ["plan", base.path("init"), "--heatmap", str(work / "map.html")], ("map.html",)
    ),
    "generate --out": Command(
        lambda base, work: ["generate", base.path("init"), *_decoding(base, 4), "--out", str(work / "texts.jsonl")],
        (),
        ("texts.jsonl",),
        _begin_texts,
    ),
    "recipes copy": Command(
        lambda base, work: ["recipes", "copy", "quickstart", str(work / "mine")], ("mine",)
    ),
    "run": Command(_pipeline, ("init", "run/checkpoint", "exported"), ("run/metrics.jsonl",)),
}  # fmt: skip


def contents(folder: Path, below: str = "") -> dict[str, str]:
    """Every file of a folder by its hash: without what depends on the clock, and the hidden ones with their names."""
    place = folder / below
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {path.relative_to(folder).as_posix(): digest(path) for path in files if path.is_file()}


def digest(path: Path) -> str:
    """A hash; times in JSON do not count, nor what is drawn of them, nor the order of a header, which is by chance."""
    content = path.read_bytes()
    # What SIGKILL leaves half-written in a hidden folder is hashed as it is: it equals nothing whole.
    with contextlib.suppress(ValueError):
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
        if path.name == "manifest.json":
            content = str(sorted(json.loads(content))).encode()
        if path.suffix in (".json", ".jsonl"):
            content = TIMES.sub('"time"', content.decode()).encode()
    if path.name in ("report.html", "speed.png") or (path.suffix == ".png" and path.parent.name == "told"):
        content = content[:4] + content[-8:]  # whole, whatever it shows
    return hashlib.sha256(content).hexdigest()
