"""Finding a checkpoint: a local folder, a training run's folder, or a Hub id. Nothing of it is trusted unread."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zconvert.checkpoint.headers import Headers, ShardFiles, read_headers
from zconvert.checkpoint.hub import Progress, fetch, hub_files
from zconvert.checkpoint.json_patch import parse_json_object, read_json_text
from zconvert.checkpoint.run_folder import METRICS_FILE, RUN_CHECKPOINT, TRAIN_STATES
from zconvert.errors import UserError
from zconvert.formats import up_to_date
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import FORMAT_VERSION, TidarSettings

CONFIG_FILE = "config.json"

Accept = Callable[[dict[str, Any], Headers], None]
"""raises a `UserError` for a checkpoint that cannot be used"""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)")


@dataclass(frozen=True)
class Source:
    """A checkpoint that is on disk now.

    Args:
        folder: where its files are.
        name: its Hub id, or the name of its folder.
        revision: the commit, where it comes from the Hub.
        files: where its shards can be read, where the weights were not fetched into the folder.
    """

    folder: Path
    name: str
    revision: str | None = None
    files: ShardFiles | None = field(default=None, repr=False, compare=False)

    @property
    def argument(self) -> str:
        """What to type to mean this checkpoint, quoted for a shell."""
        return shlex.quote(self.name if self.revision else str(self.folder))


@contextmanager
def naming_the_recipe(base: str, stage: str | None = None) -> Iterator[None]:
    """Errors about a checkpoint say that a recipe names it.

    Args:
        base: its `base_model`.
        stage: of the recipe, where there are several.
    """
    try:
        yield
    except UserError as error:
        what = f"base_model of the recipe{f' of {stage}' if stage else ''}: {error.what}"
        made = "" if _exists(Path(base).expanduser()) else "; or run the stage first that makes it"
        raise UserError(what, found=error.found, expected=error.expected, fix=f"{error.fix}{made}") from error


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
    on_progress: Progress | None = None,
    accept: Accept | None = None,
) -> Source:
    """Finds a checkpoint by what the user typed, and fetches it where it is on the Hub.

    Headers are read before weight files are fetched, so that what cannot be used costs no download.

    Args:
        name: a checkpoint's folder, a training run's folder (meaning its `checkpoint/`), or a Hub id `org/name`. A
            folder that exists comes first.
        revision: branch, tag or commit on the Hub; `main` where None.
        token: access token; the one that `hf auth login` stored where None.
        weights: False leaves the weight files where they are; `headers_of` reads their headers by ranged requests.
        on_progress: told about the download of weights.
        accept: shown `config.json` and the headers before weights are fetched; raises what is to be told instead.

    Raises:
        UserError: there is no such checkpoint, it cannot be had, or it is none.
    """
    text = str(name)
    folder = Path(text).expanduser()
    if _exists(folder):
        if revision is not None:
            raise UserError(
                f"a revision was given for the local folder {text}",
                found=f"--revision {revision}",
                expected="a revision for a Hub id only",
                fix="leave it out, or give the Hub id",
            )
        return _local(folder)
    if HUB_ID.fullmatch(text):
        folder, commit = fetch(text, revision=revision, token=token)
        config = read_config(folder)
        files = hub_files(folder, text, commit, token)
        if not weights or files is None:
            return Source(folder, text, commit, files)
        headers = read_headers(folder, files)
        if accept is not None:
            accept(config, headers)
        shards = [shard.name for shard in headers.shards]
        fetch(text, revision=commit, token=token, shards=shards, on_progress=on_progress)
        return Source(folder, text, commit)
    raise UserError(
        f"{text}: no such folder",
        found="nothing there" if _exists(folder.parent) else f"no folder {folder.parent} either",
        expected="a checkpoint's folder, a training run's folder, or a Hub id such as Qwen/Qwen3-30B-A3B",
        fix=f"check the spelling; paths begin in the folder that you are in, {Path.cwd()}",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        return parse_json_object(read_json_text(path), str(path))
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise _no_checkpoint(folder) from None
        raise


def tidar_settings(config: dict[str, Any]) -> TidarSettings | None:
    """The `tidar` section of a config, or None where the checkpoint is not converted.

    Raises:
        UserError: the section is there and cannot be used.
    """
    model = language_config(config)
    section = model.get("tidar")
    if section is None:
        return None
    fix = "convert the source again with `zconvert convert-init`, or mend the section by hand"
    if not isinstance(section, dict):
        raise UserError(
            "the tidar section of config.json is malformed", found=repr(section), expected="a JSON object", fix=fix
        )
    section = up_to_date(section, "the tidar section of config.json", FORMAT_VERSION)
    try:
        settings = TidarSettings.from_dict(section)
    except (ValueError, TypeError) as error:
        raise UserError("the tidar section of config.json cannot be used", found=error, fix=fix) from error
    rows = model.get("vocab_size")
    if isinstance(rows, int) and (settings.mask_token_id >= rows) != settings.virtual:
        raise UserError(
            "the mask token in the tidar section of config.json does not fit the model",
            found=f"mask_token_id {settings.mask_token_id}, which is to be {settings.mask_token_source}",
            expected=f"{rows} or more, which no row has" if settings.virtual else f"an id below vocab_size, {rows}",
            fix=fix,
        )
    return settings


def require_converted(source: Source) -> TidarSettings:
    """The settings of a converted checkpoint.

    Raises:
        UserError: it is not converted yet.
    """
    settings = tidar_settings(read_config(source.folder))
    if settings is None:
        raise UserError(
            f"{source.name} is not converted",
            found="no tidar section in its config.json",
            expected="a checkpoint that convert-init or midtrain wrote",
            fix=f"zconvert convert-init {source.argument} --out DIR",
        )
    return settings


def headers_of(source: Source) -> Headers:
    """The checkpoint's tensors, by the headers of its files.

    Raises:
        UserError: the weights are not there, or a file is damaged.
    """
    return read_headers(source.folder, source.files)


def fingerprint(source: Source) -> str:
    """Tells a checkpoint's causal weights from others: its configuration, and size and time of each weight file."""
    config = {key: value for key, value in read_config(source.folder).items() if key != "tidar"}
    shards = [(source.folder / shard.name).stat() for shard in headers_of(source).shards]
    facts = [config, source.revision, [[shard.st_size, shard.st_mtime_ns] for shard in shards]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # no permission to look, a name that is too long
        raise UserError(f"{path} cannot be opened", found=error.strerror, fix="check path and permissions") from error


def _local(folder: Path) -> Source:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file",
            expected="a checkpoint's folder, with config.json and *.safetensors",
            fix=f"give the folder: {folder.parent}" if (folder.parent / CONFIG_FILE).exists() else "give such a folder",
        )
    checkpoint = folder / RUN_CHECKPOINT
    if not (folder / CONFIG_FILE).exists():
        if (checkpoint / CONFIG_FILE).exists():
            folder = checkpoint
        elif (folder / TRAIN_STATES).is_dir() or (folder / METRICS_FILE).exists():
            raise UserError(
                f"{folder} is a training run without a checkpoint yet",
                found=f"no folder {checkpoint}",
                expected="a finished run",
                fix="finish it: run `zconvert midtrain` with its recipe again, which resumes",
            )
    read_config(folder)
    name, revision = _identity(folder)
    return Source(folder, name, revision)


def _identity(folder: Path) -> tuple[str, str | None]:
    """Name and commit of a local folder; a snapshot in the Hub's cache keeps its Hub id."""
    absolute = folder.absolute()
    cached = _CACHED.fullmatch(absolute.parent.parent.name)
    if cached and absolute.parent.name == "snapshots":
        return f"{cached['org']}/{cached['name']}", absolute.name
    absolute = folder.resolve()
    if absolute.name == RUN_CHECKPOINT:  # says nothing: the folder around it names the model or the run
        absolute = absolute.parent
    return absolute.name, None


def _no_checkpoint(folder: Path) -> UserError:
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    found, fix = f"no {CONFIG_FILE}", "give the folder that has config.json and the weights"
    if "adapter_config.json" in names:
        found, fix = "a LoRA adapter", "merge the adapter into its base model first (peft: `merge_and_unload`)"
    elif "model_index.json" in names:
        found, fix = "a diffusers pipeline", "zconvert converts language models only"
    elif any(name.endswith(".gguf") for name in names):
        found, fix = "GGUF weights", "give the original checkpoint in the Hugging Face layout"
    elif not names:
        found = "an empty folder"
    return UserError(f"{folder} is not a checkpoint", found=found, expected=f"a folder with {CONFIG_FILE}", fix=fix)
