"""A folder in which the commands of a page find what they name: small stand-ins for models, runs, data and the Hub."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from tests.checkpoint.loopback_hub import LoopbackHub, serve
from tests.checkpoint.pushed import TOKEN, Pushes
from tests.checkpoint.tiny import make_checkpoint
from tests.docs.pages import ROOT, Command
from tests.evaluation.rows import ROWS
from tests.small_recipes import made_small
from zconvert.cli.main import app

SOURCE = ROOT / "examples" / "tiny-zaya" / "checkpoint"
ON_THE_HUB = {"Qwen/Qwen3-30B-A3B": "qwen3_moe", "Zyphra/ZAYA1-8B": "zaya"}
DEFAULTS = {
    "bench": {"--num-prompts": "1", "--max-new-tokens": "8", "--threads": "1"},
    "generate": {"--max-new-tokens": "8"},
    "evaluate": {"--limit": "1", "--max-new-tokens": "8", "--threads": "1"},
}
"""command -> options that keep it short, where a page does not set them"""
SHORTER = {"--limit", "--num-prompts"}
"""of these, those that are set whatever a page says"""


@dataclass
class World:
    """The folder, and what it is made from."""

    folder: Path
    made: Path
    """stand-ins made once for all pages"""

    def put(self, name: str) -> None:
        """Puts a stand-in into its place, where nothing is there yet."""
        for path, made in PLACES[name].items():
            there = self.folder / path
            if not there.exists():
                there.parent.mkdir(parents=True, exist_ok=True)
                whole = self.made / made
                shutil.copytree(whole, there) if whole.is_dir() else shutil.copyfile(whole, there)

    def run(self, command: Command, *, small: bool = True, verify: bool = True) -> tuple[int, str, str]:
        """Runs a command of zconvert here.

        Args:
            command: of a page.
            small: recipes are made small, and options added that keep it short.
            verify: exports are run in an interpreter of their own, as they are by default, which takes seconds.

        Returns:
            Exit code, stdout and stderr.
        """
        words = list(command.words[1:])
        words = self._small(words) if small else words
        if words[0] == "export" and not verify and {"--out", "--hub"} & set(words):
            words.append("--no-verify")
        stdin = None if command.stdin is None else (self.folder / command.stdin).read_text()
        done = CliRunner().invoke(app, words, input=stdin, env={"COLUMNS": "80", **command.environment})
        if command.stdout is not None:
            (self.folder / command.stdout).write_text(done.stdout)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    def _small(self, words: list[str]) -> list[str]:
        """The words, their recipes made small and options added that keep it short."""
        for word in words[1:]:
            path = Path(word)
            if path.suffix == ".yaml" and path.is_file():
                self._shrink(path)
        for option, value in DEFAULTS.get(words[0], {}).items():
            if option in SHORTER and option in words:
                words[words.index(option) + 1] = value
            elif option not in words:
                words += [option, value]
        if words[0] in ("evaluate", "tasks") and any(name in ROWS for word in words for name in word.split(",")):
            words = [",".join(self._from_a_file(name) for name in word.split(",")) for word in words]
        return words

    def _from_a_file(self, task: str) -> str:
        return f"{task}={self.made / 'rows' / task}.jsonl" if task in ROWS else task

    def _shrink(self, path: Path) -> None:
        settings = yaml.safe_load(path.read_text())
        for stage in ("convert-init", "midtrain", "extend-context", "sft"):
            if stage in settings:
                self._shrink(path.parent / settings[stage])
        if "base_model" in settings:
            small = made_small(settings, text=self.made / "train.jsonl", chat=self.made / "chat.jsonl")
            path.write_text(json.dumps(small))


PLACES = {
    "source": {"source": "source"},
    "init": {"out/quickstart/init": "init"},
    "run": {"run": "run"},
    "exported": {"my-tidar-model": "exported"},
    "questions": {"questions.jsonl": "questions.jsonl"},
    "prompts": {"prompts.jsonl": "prompts.jsonl"},
    "config": {"config.json": "source/config.json"},
    "quickstart": {
        "out/quickstart/init": "init",
        "out/quickstart/run": "run",
        "out/quickstart/gated/run": "gated",
        "out/quickstart/train.jsonl": "train.jsonl",
        "out/quickstart/prompts.jsonl": "prompts.jsonl",
    },
}
"""stand-in -> its places in a page's folder, and what lies there"""


def make_stand_ins(folder: Path) -> None:
    """Everything that `PLACES` names: the small ZAYA of the examples, converted and trained for two steps."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(SOURCE, folder / "source")
    problems = [sys.executable, str(ROOT / "examples" / "tiny-zaya" / "problems.py"), "--count", "40"]
    for name, more in {
        "train.jsonl": ["--split", "train", "--per-document", "2"],
        "prompts.jsonl": ["--split", "held_out"],
    }.items():
        subprocess.run([*problems, *more, "--out", str(folder / name)], check=True)
    said = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5."}]
    rows = {"chat": [{"messages": said}] * 8, "questions": [{"prompt": "2+3?"}] * 3}
    (folder / "rows").mkdir()
    for name, lines in {**rows, **{f"rows/{task}": lines for task, lines in ROWS.items()}}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, mode in (("run", "full"), ("gated", "gated")):
        init = folder / ("init" if mode == "full" else "gated-init")
        _zconvert("convert-init", folder / "source", "--out", init, "--mode", mode, "--proposals", "1,3,5,8")
        settings = {"base_model": str(init), "output_dir": str(folder / name), "learning_rate": 1e-3, "datasets": []}
        small = made_small(settings, text=folder / "train.jsonl", chat=folder / "chat.jsonl")
        (folder / f"{name}.yaml").write_text(json.dumps(small))
        _zconvert("midtrain", folder / f"{name}.yaml")
    _zconvert("export", folder / "run", "--out", folder / "exported", "--no-verify")


def _zconvert(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output


@contextlib.contextmanager
def loopback(folder: Path) -> Iterator[None]:
    """A Hub with tiny models under the names of large ones, which can be pushed to."""
    repositories = {}
    for name, family in ON_THE_HUB.items():
        repositories[name] = make_checkpoint(folder / family, family, mask_token=family == "zaya")
        config = repositories[name] / "config.json"
        settings = json.loads(config.read_text()) | {"max_position_embeddings": 2048}  # room for a task's examples
        config.write_text(json.dumps(settings))
    with (
        serve(LoopbackHub(repositories, pushes=Pushes(folder / "pushed"))) as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        (folder / "pushed").mkdir()
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        for name, value in {
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(folder / "cache"),
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        yield
