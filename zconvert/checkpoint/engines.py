"""What other programs do with an exported folder: facts in one table, each with the version that it was read in.

Nobody ran the serving engines for it: it says which architectures their own lists of models name. To renew it, read the
lists again: `model_executor/models/registry.py` of vLLM, `EntryClass` in `srt/models` of SGLang, `TEXT_MODEL_MAP` in
`conversion/__init__.py` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from zconvert.checkpoint.headers import Headers
from zconvert.checkpoint.parameters import INPUT_EMBEDDINGS, find_tensor
from zconvert.checkpoint.source import Source, headers_of, read_config, require_converted
from zconvert.tidar.families import language_config

Loads = Literal["yes", "no", "not known"]


def _names(text: str) -> frozenset[str]:
    """Architectures by the words before `ForCausalLM`, or before `ForConditionalGeneration` with a `+`."""
    return frozenset(
        f"{word[:-1]}ForConditionalGeneration" if word.endswith("+") else f"{word}ForCausalLM" for word in text.split()
    )


@dataclass(frozen=True)
class Engine:
    """One row of the table."""

    name: str
    version: str
    """that was read"""
    command: str
    """that runs a folder or Hub id, named {path}"""
    tidar: str
    """what TiDAR decoding would need there"""
    architectures: frozenset[str] | None = None
    """those that its list of models names, of those that can be converted; None: all"""
    by_transformers: frozenset[str] = frozenset()
    """those that its list runs through transformers' code"""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "transformers",
            "5.17 to 5.23",
            'model = AutoModelForCausalLM.from_pretrained("{path}")',
            "nothing: trust_remote_code=True, transformers 5.17 or newer and torch 2.11 or newer",
        ),
        Engine(
            "vllm",
            "0.33.0",
            "vllm serve {path}",
            "a plugin (entry point vllm.general_plugins): a proposer of method custom_class alone cannot do it, since "
            "the draft comes out of the same forward that verifies",
            architectures=_names(
                "AXK1 Afmoe Aria+ Beam Cohere Cohere2 Cohere2Moe Dbrx DeepseekV2 DeepseekV3 DeepseekV32 Dots3Note "
                "Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe Flint Gemma Gemma2 Gemma3 Gemma3+ Gemma4 Gemma4+ Glm4 Glm4Moe "
                "Glm4MoeLite GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared HYV3 "
                "HYV4 Inkling Inkling+ Laguna Lfm2 Lfm2Moe Llama Llama4 Llama4+ LongcatFlash MiMoV2 MiMoV2Flash "
                "MiniMaxM2 Mistral Mistral3+ Mixtral Nemotron Olmoe Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 Qwen3Moe StableLm"
            ),
            by_transformers=_names(
                "Arcee FlexOlmo Glm HunYuanDenseV1 HunYuanMoEV1 Kolibri1 Mellum Olmo2 Olmo3 SeedOss SmolLM3 Starcoder2"
            ),
        ),
        Engine(
            "sglang",
            "0.5.23",
            "python -m sglang.launch_server --model-path {path}",
            "a plugin (entry point sglang.srt.plugins) that registers a speculative algorithm by "
            "SpeculativeAlgorithm.register, with a worker of its own: docs/serving.md of zconvert",
            architectures=_names(
                "Afmoe Arcee Beam Cohere Cohere2 Cohere2Moe Dbrx DeepseekV2 DeepseekV3 DeepseekV32 Dots3Note Ernie4_5_ "
                "Ernie4_5_Moe Exaone4 ExaoneMoe Gemma Gemma2 Gemma3 Gemma3+ Gemma4 Gemma4+ Glm4 Glm4Moe Glm4MoeLite "
                "GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared HYV3 HYV4 "
                "HunYuanDenseV1 HunYuanMoEV1 Inkling+ Laguna Lfm2 Lfm2Moe Llama Llama4 Llama4+ LongcatFlash Mellum "
                "MiMoV2 MiMoV2Flash MiniMaxM2 Mistral Mistral3+ Mixtral Olmo2 Olmoe Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 "
                "Qwen3Moe StableLm Starcoder2 Zaya"
            ),
        ),
        Engine(
            "llama.cpp",
            "commit 00bdaa1",
            "python convert_hf_to_gguf.py {path} --outfile model.gguf && llama-server -m model.gguf",
            "changes to llama.cpp itself, which has no seam for it: an attention mask per slot, and a draft read from "
            "the slots of the forward that verifies",
            architectures=_names(
                "Afmoe Arcee Cohere Cohere2 Cohere2Moe Dbrx DeepseekV2 DeepseekV3 DeepseekV32 Dots1 Ernie4_5 Ernie4_5_ "
                "Ernie4_5_Moe Exaone4 Gemma Gemma2 Gemma3 Gemma3+ Gemma4 Gemma4+ Glm Glm4 Glm4Moe Glm4MoeLite "
                "GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 "
                "Lfm2 Lfm2Moe Llama Llama4 Llama4+ Mellum MiMoV2 MiMoV2Flash MiniMaxM2 Mistral Mistral3+ Mixtral "
                "Nemotron Olmo2 Olmo3 Olmoe Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 Qwen3Moe SeedOss SmolLM3 SolarOpen "
                "StableLm Starcoder2"
            ),
        ),
    )
}
"""by the name that `zconvert export --check` takes"""

_SGLANG_ZAYA = ".zaya_block.experts.local_experts."
"""in the only names of weights that SGLang's loader of ZAYA knows"""


@dataclass(frozen=True)
class Verdict:
    """What one engine does with one folder."""

    engine: str
    version: str
    loads: Loads
    """autoregressively"""
    why: str
    command: str | None
    tidar: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def check(source: Source, engine: Engine) -> Verdict:
    """What the table says of a converted checkpoint. No weights are read but their headers.

    Raises:
        UserError: the checkpoint is not converted, or damaged.
    """
    require_converted(source)
    loads, why = _judge(engine, read_config(source.folder), headers_of(source))
    command = engine.command.format(path=source.argument) if loads == "yes" else None
    return Verdict(engine.name, engine.version, loads, why, command, engine.tidar)


def serving_lines(config: Mapping[str, Any], headers: Headers) -> str:
    """For a model card: the command of each serving engine, or why there is none."""
    lines = []
    for engine in list(ENGINES.values())[1:]:
        loads, why = _judge(engine, config, headers)
        command = f"`{engine.command.format(path='PATH_OR_HUB_ID')}`: " if loads == "yes" else ""
        lines.append(f"- {engine.name}: {command}{why}")
    return "\n".join([*lines, "\nRead in these versions' lists of models; not run for this card."])


def _judge(engine: Engine, config: Mapping[str, Any], headers: Headers) -> tuple[Loads, str]:
    names = config.get("architectures") or []
    name = str(names[0]) if names else "no architecture"
    if engine.architectures is None:
        return "yes", f"it is a plain {name} there, and in 4.57, from a folder, where that has the family"
    listed = f"its list of models ({engine.version})"
    if name not in engine.architectures | engine.by_transformers:
        return "not known", f"{listed} does not name {name}"
    problem = _problem(engine, config, headers)
    if problem is not None:
        return "no", problem
    return "yes", f"{listed} names {name}" + (", by transformers' code" if name in engine.by_transformers else "")


def _problem(engine: Engine, config: Mapping[str, Any], headers: Headers) -> str | None:
    """What else keeps a folder from loading there."""
    if engine.name == "vllm":
        if "canvas_length" in language_config(dict(config)):
            return "config.json has canvas_length, by which vLLM takes it for another kind of diffusion model"
        embedding, size = find_tensor(headers, INPUT_EMBEDDINGS), language_config(dict(config)).get("vocab_size")
        if embedding is not None and embedding.shape[0] != size:
            return f"vocab_size is {size} and the embedding has {embedding.shape[0]} rows: vLLM asserts that they agree"
    zaya = config.get("architectures") == ["ZayaForCausalLM"]
    if engine.name == "sglang" and zaya and not any(_SGLANG_ZAYA in name for name in headers.tensors):
        return "its loader of ZAYA knows only older names of the weights (zaya_block.experts.local_experts)"
    return None
