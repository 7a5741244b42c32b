"""A checkpoint on disk -> a model and its tokenizer in memory, with nothing missing and nothing said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zconvert.checkpoint.folder import companions
from zconvert.checkpoint.headers import Headers
from zconvert.checkpoint.mask_token import TOKENIZER_FILE, read_vocabulary
from zconvert.checkpoint.quantisation import UNPACKED_AT_LOAD, quantisation
from zconvert.checkpoint.source import CONFIG_FILE, Source, headers_of, read_config, tidar_settings
from zconvert.errors import UserError, out_of_memory
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import GATED_FILE

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "num_nextn_predict_layers")
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_model(source: Source, *, dtype: str = "auto", device: str = "auto", sharding: Any = None) -> tuple[Any, Any]:
    """Loads a checkpoint's model, in evaluation mode, and its tokenizer. No code of the checkpoint is run.

    Args:
        source: from `resolve`.
        dtype: float32, bfloat16, or auto for the checkpoint's own.
        device: cpu, cuda (or another name torch knows), or auto for a GPU where there is one.
        sharding: a `DistributedConfig` of transformers: each process loads its shard, onto its own device.

    Returns:
        The `…ForCausalLM` and the tokenizer.

    Raises:
        UserError: the checkpoint cannot be loaded, a weight is missing, or the model does not run.
        MemoryError, RuntimeError: it does not fit, see `out_of_memory`.
    """
    if dtype not in DTYPES:
        raise UserError("there is no such dtype", found=dtype, expected=", ".join(DTYPES), fix="choose one of these")
    import torch

    place = _device(device)
    _check_files(source)
    tokenizer = _tokenizer(source)
    with _quiet():
        try:
            wanted = dtype if dtype == "auto" else getattr(torch, dtype)
            loaded: Any = model_class(source).from_pretrained(
                source.folder,
                dtype=wanted,
                output_loading_info=True,
                distributed_config=sharding,
                use_safetensors=True,
                **_unpacking(source),
                **_LOCAL,
            )
        except Exception as error:  # safetensors has an exception type of its own
            if out_of_memory(error) is not None:
                raise
            raise _unloadable(source, "model", error) from error
    model, report = loaded
    # transformers fills missing weights with random numbers and goes on.
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise UserError(
            f"the weights of {source.name} do not fit its config.json",
            found=f"{len(missing)} weights missing or of another shape, first {missing[0]}",
            expected="every weight that the architecture has",
            fix="download or copy the checkpoint again",
        )
    model.eval()
    if sharding is None:
        _check_runs(source, model.to(place), tokenizer)
    return model, tokenizer


def _check_runs(source: Source, model: Any, tokenizer: Any) -> None:
    """Refuses a model that cannot compute a word: sizes that no weight has show where they are used, if at all."""
    import torch

    ids = tokenizer("a b", add_special_tokens=False).input_ids or [0]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        raise UserError(
            f"the model of {source.name} cannot be run",
            found=_line(error),
            expected="a config.json whose sizes agree with each other, with the weights and with the tokenizer",
            fix=f"compare {source.folder / CONFIG_FILE} with the original, or download the checkpoint again",
        ) from error


def load_tokenizer(source: Source) -> Any:
    """Loads a checkpoint's tokenizer alone; its weights need not be there.

    Raises:
        UserError: it cannot be loaded.
    """
    companions(source.folder)  # as `_check_own` does
    if (source.folder / TOKENIZER_FILE).exists():
        read_vocabulary(source.folder)  # damage is told apart better here than by a loader
    return _tokenizer(source)


def _tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **_LOCAL)
            tokenizer("a b", add_special_tokens=False)  # some settings that no text goes through show here first
            return tokenizer
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise _unloadable(source, "tokenizer", error) from error


def prompt_ids(tokenizer: Any, text: str, *, add_bos: bool = True) -> list[int]:
    """A prompt's tokens: BOS where the tokenizer has one, then the text, without other special tokens.

    Raises:
        UserError: nothing is left to start from.
    """
    bos = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
    ids = [*bos, *tokenizer(text, add_special_tokens=False).input_ids]
    if not ids:
        raise UserError(
            "the prompt is empty", found="no token at all", expected="at least one", fix="give some text to go on from"
        )
    return ids


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: those of the generation config and the tokenizer's own EOS.

    Raises:
        UserError: the generation config has no ids there.
    """
    from zconvert.tidar.generate import token_ids

    said = model.generation_config.eos_token_id
    try:
        return token_ids(said) | token_ids(tokenizer.eos_token_id)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(
            "eos_token_id of generation_config.json is no token",
            found=f"{said!r:.100}",
            expected="an id, or a list of ids",
            fix="correct it, or download or copy the checkpoint again",
        ) from error


def model_class(source: Source) -> Any:
    """The class by which transformers loads a checkpoint as a causal language model.

    A composite model is loaded whole, so that it can be saved whole, and some text models (Mistral 4's) are in none of
    its lists: `architectures` names the class.
    """
    import transformers

    config = read_config(source.folder)
    model_type, names = str(config.get("model_type")), config.get("architectures")
    listed = model_type in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if language_config(config) is not config or not listed:
        module = getattr(transformers.models, model_type, None)
        for name in names if isinstance(names, list) else []:
            if str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) and hasattr(module, str(name)):
                return getattr(module, str(name))
    return transformers.AutoModelForCausalLM


def _unpacking(source: Source) -> dict[str, Any]:
    """Has packed weights unpacked also where there are kernels for them: these know neither float32 nor gradients."""
    packed = quantisation(read_config(source.folder), headers_of(source))
    if packed is None or packed.method not in UNPACKED_AT_LOAD:
        return {}
    from transformers.utils.quantization_config import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def _check_files(source: Source) -> None:
    """Refuses what transformers would load as something else: without tokenizer files it makes up an empty one."""
    headers = headers_of(source)  # damaged weights are told apart better here than by a loader
    config = read_config(source.folder)
    _check_own(source, config, headers)
    vocabulary, settings = read_vocabulary(source.folder), tidar_settings(config)
    if settings is None:
        return
    if not settings.virtual and vocabulary.ids.get(settings.mask_token) != settings.mask_token_id:
        found = vocabulary.ids.get(settings.mask_token)
        raise UserError(
            "the tokenizer is not the one that the checkpoint was converted with",
            found=f"no token {settings.mask_token!r}" if found is None else f"{settings.mask_token!r} has id {found}",
            expected=f"the mask token {settings.mask_token!r} with id {settings.mask_token_id}",
            fix="copy the tokenizer's files from the converted checkpoint",
        )
    trained = settings.stages if settings.mode == "gated" else ()
    if trained and not (source.folder / GATED_FILE).exists():
        raise UserError(
            f"the gated weights of {source.name} are missing",
            found=f"no {GATED_FILE}",
            expected=f"the weights that {', '.join(trained)} trained",
            fix="copy or download the checkpoint again, with its folders",
        )


def _check_own(source: Source, config: dict[str, Any], headers: Headers) -> None:
    """Refuses what would have transformers load something else than this folder, or run what is not its own."""
    companions(source.folder)  # all that transformers may read are files, and no links out of the folder
    strays = []
    sections = [config]
    while sections:
        section = sections.pop()
        sections += [inner for inner in section.values() if isinstance(inner, dict)]
        for key, value in section.items():
            # Other weights than those that were looked at; attention by code of the Hub's; and layers without weights,
            # which would be made up, were there a million of them.
            elsewhere = key == "transformers_weights" or ("implementation" in key and "/" in str(value))
            if elsewhere or (key in _LAYER_COUNTS and type(value) is int and value > len(headers.tensors)):
                strays.append(f"{key}: {value!r:.100}")
    if (source.folder / "adapter_config.json").exists():  # transformers would load the model that it names, with peft
        strays.append("adapter_config.json beside a model's weights")
    if strays:
        raise UserError(
            f"{source.name} asks for something that is no part of it",
            found=f"{'; '.join(strays[:5])}, beside weights of {len(headers.tensors):,} tensors",
            expected="a model whose config.json and weights are all there is to it",
            fix="take a checkpoint that you trust, or mend its config.json",
        )


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        expected = ", ".join(DEVICES)
        raise UserError("there is no such device", found=name, expected=expected, fix="choose one of these") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device that torch can use",
            found=f"torch {torch.__version__}",
            fix="choose the device cpu, or install a CUDA build of torch and its driver",
        )
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and warnings away; a caller's own settings come back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _unloadable(source: Source, part: str, error: Exception) -> UserError:
    return UserError(
        f"the {part} of {source.name} cannot be loaded",
        found=_line(error),
        expected="a checkpoint that this version of transformers can load",
        fix=f"look into {source.folder}; `zconvert inspect {source.argument}` tells what is there",
    )


def _line(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
