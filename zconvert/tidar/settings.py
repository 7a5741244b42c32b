"""The `tidar` section of `config.json`: what a converted checkpoint says of itself. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

FORMAT_VERSION = 1
DEFAULT_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 1024
DEFAULT_MASK_INIT = "mean"
_KINDS: dict[str, type] = {
    "block_size": int,
    "mask_token_id": int,
    "mask_token": str,
    "mask_token_source": str,
    "mode": str,
    "block_offset": str,
    "format_version": int,
}


MODES = ("full", "gated")
GATED_FILE = "tidar/gated.safetensors"
"""in a checkpoint's folder; deep enough that engines which load every *.safetensors of a folder pass it by"""
BIGRAM_FILE = "tidar/bigram.safetensors"
"""likewise: which token follows which (bigram.py); a checkpoint may have none"""
OWN_FILES = (GATED_FILE, BIGRAM_FILE)
MIXERS = ("attn", "attention", "conv")
"""what the name of a layer's child has in it that mixes tokens; gated mode updates the projections in there"""
NOT_UPDATED = ("kv_b_proj", "indexer", "router")
"""but for these: of the cached latent, which are not of the row's tokens, and what chooses keys or experts"""


@dataclass(frozen=True)
class GatedParts:
    """Weights that act at mask slots only: which parts there are, and how large (gated.py has them)."""

    rank: int = 32
    """of the low-rank updates of attention projections; 0: none"""
    mlp: Literal["none", "add", "replace"] = "replace"
    """what the diffusion expert does at a mixture-of-experts block: replace the routed experts, add to them, or none.
    At a dense MLP it is always added"""
    mlp_width: int = 384
    """of the diffusion expert"""
    norms: bool = False
    """a scale and a shift after every norm over hidden states"""
    router: bool = False
    """a shift of what the routers see, where mask slots keep the routed experts"""
    mask_embedding: bool = True
    """mask slots have an embedding of their own instead of the mask token's row"""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise ValueError(f"rank is {self.rank!r}, expected 0 (none) or more")
        if self.mlp not in ("none", "add", "replace"):
            raise ValueError(f"mlp is {self.mlp!r}, expected none, add or replace")
        if self.mlp != "none" and (type(self.mlp_width) is not int or self.mlp_width < 1):
            raise ValueError(f"mlp_width is {self.mlp_width!r}, expected at least 1")
        if self.router and self.mlp == "replace":
            raise ValueError(
                "router is true and mlp is 'replace': no router runs where the routed experts are replaced"
            )

    def described(self) -> str:
        """In a few words.

        >>> GatedParts(rank=4, mlp="none").described()
        'low rank 4, mask embedding'
        """
        expert = {"replace": "in place of the routed ones", "add": "beside the routed ones"}.get(self.mlp)
        parts = [f"low rank {self.rank}"] if self.rank else []
        parts += [f"diffusion expert of {self.mlp_width} {expert}"] if expert else []
        named = {"norms": self.norms, "routers": self.router, "mask embedding": self.mask_embedding}
        parts += [name for name, there in named.items() if there]
        return ", ".join(parts)


@dataclass(frozen=True)
class TidarSettings:
    """Settings under the key `tidar` of `config.json`.

    >>> TidarSettings(block_size=4, mask_token_id=9).default_proposals()
    (1, 2, 3, 4)
    """

    block_size: int
    """tokens per diffusion block"""
    mask_token_id: int
    """id of the mask token; never sampled"""
    mask_token: str = "<mask>"
    """its text in the tokenizer; empty where it is virtual"""
    mask_token_source: str = "existing"
    """where its embedding row came from: existing, spare_row or grown. virtual: the token has neither row nor text, its
    id follows the last row's, and mask slots have an embedding of their own"""
    mode: str = "full"
    """full: every weight is trained. gated: the source is frozen, and small weights act at mask slots only"""
    gated: GatedParts | None = None
    """of mode gated"""
    block_offset: str = "zero"
    """phase of training blocks in a document: zero (every document starts a block) or random"""
    proposals: tuple[int, ...] | None = None
    """accepted counts that get a proposal block in single-forward decoding, ascending; None: all, 1 to block_size"""
    base_model: str | None = None
    """the source checkpoint: Hub id, or folder name"""
    base_revision: str | None = None
    """its Hub commit, where known"""
    stages: tuple[str, ...] = ()
    """training stages gone through, in order"""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"tidar.{name} is {value!r}, expected {'a whole number' if kinds is int else 'text'}")
        for name in ("base_model", "base_revision"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"tidar.{name} is {value!r}, expected text")
        if not isinstance(self.stages, tuple) or not all(isinstance(stage, str) for stage in self.stages):
            raise ValueError(f"tidar.stages is {self.stages!r}, expected a list of names")
        if self.proposals is not None and not isinstance(self.proposals, tuple):
            raise ValueError(f"tidar.proposals is {self.proposals!r}, expected a list of accepted counts")
        if self.proposals is not None and not all(type(count) is int for count in self.proposals):
            raise ValueError(f"tidar.proposals are {list(self.proposals)}, expected whole numbers")
        if not 2 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"tidar.block_size is {self.block_size}, expected 2 to {MAX_BLOCK_SIZE}")
        if self.mode not in MODES or (self.mode == "gated") != (self.gated is not None):
            parts = "no gated parts" if self.gated is None else "gated parts"
            raise ValueError(f"tidar.mode is {self.mode!r} with {parts}, expected full, or gated and its parts")
        if self.virtual and (self.gated is None or not self.gated.mask_embedding):
            raise ValueError("tidar.mask_token_source is virtual, expected mode gated and a mask_embedding with it")
        if self.mask_token_id < 0:
            raise ValueError(f"tidar.mask_token_id is {self.mask_token_id}, expected a token id")
        if self.proposals is not None:
            check_proposals(self.proposals, self.block_size)

    @property
    def virtual(self) -> bool:
        """Whether the mask token is an id alone: no row, no text."""
        return self.mask_token_source == "virtual"

    def lossless_means(self) -> str:
        """The mode, and whose text lossless decoding gives; `base_model` in it is text of a stranger's file.

        >>> TidarSettings(block_size=4, mask_token_id=9, base_model="org/base").lossless_means()
        "full: lossless means the text of this checkpoint's own AR decoding, not of org/base"
        """
        source = self.base_model or "its source"
        if self.mode == "gated":
            return f"gated: lossless means the text of {source}"
        return f"full: lossless means the text of this checkpoint's own AR decoding, not of {source}"

    def default_proposals(self) -> tuple[int, ...]:
        """The proposal set to decode with where the caller names none."""
        return self.proposals if self.proposals is not None else tuple(range(1, self.block_size + 1))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in JSON."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return values if self.gated is not None else {k: v for k, v in values.items() if k != "gated"}

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> TidarSettings:
        """Reads the section; keys of newer versions are ignored.

        Raises:
            ValueError: a key is missing or has a value that cannot work, or the section is of a newer layout.
        """
        version = section.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:  # first: of a newer layout nothing else can be said
            raise ValueError(f"tidar.format_version is {version}, this version reads up to {FORMAT_VERSION}: upgrade")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items() if k in known}
        missing = {"block_size", "mask_token_id"} - values.keys()
        if missing:
            raise ValueError(f"tidar section lacks {', '.join(sorted(missing))}")
        if isinstance(values.get("gated"), dict):
            parts = {f.name for f in fields(GatedParts)}
            values["gated"] = GatedParts(**{k: v for k, v in values["gated"].items() if k in parts})
        return cls(**values)


def check_proposals(proposals: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """Returns the proposal set sorted and without repeats.

    Raises:
        ValueError: it is empty, or an accepted count is not in 1 … block_size.
    """
    counts = tuple(sorted(set(proposals)))
    if not counts or counts[0] < 1 or counts[-1] > block_size:
        raise ValueError(f"proposals are {list(proposals)}, expected accepted counts from 1 to {block_size}")
    return counts
