"""Memory of one device while it trains, by part.

Symbols: P parameters, N devices, c context-parallel and e expert-parallel devices, T clean tokens a row, R rows a
forward, H hidden width, L layers, V vocabulary, b bytes of a number in the forward (2 or 4). A device holds
`n = R · 2T / c` tokens of packed rows (`(1 + f) T` where a fraction f of the blocks is drawn).

**Full mode.** Every weight has a float32 master, gradient, mean and square: 16 P / N bytes (4 + 4 + about 2 with 8-bit
Adam, 4 + 4 + 4 with Muon). FSDP gathers them in float32, and where gradients are summed once in several forwards each
device adds up the whole model's, 4 P. **Gated mode.** The frozen source takes what it takes on disk where the forward
is in bfloat16, else 4 P, or packed P · bits / 8 and its scales; the trained weights 16 bytes each. Its clean half runs
first and without gradients: of it stay keys and values alone, `R · T / c · KV width · b`, and activations are those of
the mask half, `n / 2` tokens.

Activations that a layer keeps for its backward pass, bytes a token (measured with saved-tensor hooks on transformers'
own Llama, Mixtral, Qwen3-MoE and ZAYA; tests/planning/test_memory.py holds the formula against them):

    28 H                   two norms keep three float32 states each, matrices their inputs
    4 b Q  (6 b + 2 b KV)  queries: projected, rotated, attended, put together (with norms on queries and keys)
    4 b I                  MLP and experts that a token passes: gate, up, activated gate, their product
    2 b k H                k routed experts: the state each one gets, and what each one returns
    CCA: + 16 H + 6 b Q + 6 b KV   residual scales and convolutions; where they are frozen (gated mode), 3 b Q

With gradient checkpointing a layer keeps its input alone, `4 H` (the residual stream is float32) and what ZAYA's
routers hand on; and one layer's activations are there while it is run again.
"""

from __future__ import annotations

from dataclasses import dataclass

from zconvert.planning.layouts import Layout
from zconvert.planning.model import ModelFacts
from zconvert.planning.workload import Workload

CHUNK_LOGITS = 2**27
"""logits in a chunk of no stated size: half a GiB in float32"""
_RESIDUAL_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, by part."""

    parameters: float
    """trained and frozen weights, and their copies in the forward's format"""
    gradients: float
    optimizer: float
    activations: float
    """of the layers that are kept, or of the one that is run again"""
    packed_sequence: float
    """what grows with the tokens and stays through the whole forward: layers' inputs, final states, clean keys"""
    loss_chunk: float
    """logits of a chunk, and the head in the forward's format with its gradient"""
    communication: float
    """layers and embedding gathered from other devices, keys gathered along the context"""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """By name, in bytes."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def memory_of(model: ModelFacts, work: Workload, layout: Layout) -> Memory:
    """Memory of one device.

    Args:
        model: what is trained.
        work: the stage.
        layout: how it is spread over devices.

    Returns:
        an estimate of the peak: parts that do not meet at one moment are added up all the same.
    """
    tokens = work.micro_batch_size * work.tokens_per_row / layout.context_parallel
    number, shards = work.compute_bytes, layout.fsdp
    gated = None if work.gated is None else model.gated_parameters(work.gated)
    trained = model.total if gated is None else gated
    masters = 4 * trained / shards
    if gated is None:
        # Without shards autocast keeps copies of weights in the forward's format; with them they are gathered.
        weights = masters + (0 if layout.sharded or number == 4 else number * model.total)
    else:
        weights = masters + _source_bytes(model, work) / shards
    learning = work.learning * tokens
    kept = layer_bytes(model, work) * learning
    if work.gradient_checkpointing:
        inputs = learning * model.layers * (_RESIDUAL_BYTES * model.hidden + number * model.carried)
    else:
        inputs, kept = 0.0, kept * model.layers
    # After the last layer: states, the scored ones among them, and their gradient.
    inputs += learning * 3 * _RESIDUAL_BYTES * model.hidden
    if gated is not None:
        inputs += (tokens - learning) * (number * model.kv_width + 2 * _RESIDUAL_BYTES * model.hidden)
    return Memory(
        parameters=weights,
        gradients=4 * trained * (1 / shards + work.gathers_gradients(layout.sharded)),
        optimizer=work.state_bytes * trained / shards,
        activations=kept,
        packed_sequence=inputs,
        loss_chunk=_loss_bytes(model, work, tokens, train_head=gated is None, sharded=layout.sharded),
        communication=_communication_bytes(model, work, layout, tokens),
    )


def layer_bytes(model: ModelFacts, work: Workload) -> float:
    """Bytes a token that a layer keeps for its backward pass, on average over layers."""
    number, hidden, queries, keys = work.compute_bytes, model.hidden, model.queries, model.keys
    size = 28.0 * hidden + 4 * number * queries
    if model.qk_norm:
        size += number * (2 * queries + 2 * keys)
    if model.attention_kind == "cca" and work.gated is None:
        size += 16 * hidden + number * (6 * queries + 6 * keys)
    elif model.attention_kind == "cca":
        size += 3 * number * queries
    if work.gated is not None and work.gated.mlp == "replace" and model.experts:
        return size + 4 * number * work.gated.mlp_width  # no routed expert runs at mask slots
    size += 4 * number * model.mlp_width
    size += 2 * number * model.experts_per_token * hidden * model.moe_layers / model.layers
    if work.gated is not None and work.gated.mlp != "none":
        size += 4 * number * work.gated.mlp_width
    return size


def _source_bytes(model: ModelFacts, work: Workload) -> float:
    if work.source_bits is None:
        return float(model.stored_bytes)
    if work.source_bits >= 16:
        return model.total * work.source_bits / 8
    # Matrices are packed, with a scale for each 64 of them; embedding and head stay as they are.
    outer = model.head_parameters * (1 if model.tied else 2)
    return 2 * outer + (model.total - outer) * (work.source_bits / 8 + 2 / 64)


def _loss_bytes(model: ModelFacts, work: Workload, tokens: float, *, train_head: bool, sharded: bool) -> float:
    chunk = min(tokens, work.loss_chunk_size or CHUNK_LOGITS // model.vocabulary)
    # Logits in the forward's format and in float32, and what their softmax takes beside; twice for a teacher's.
    logits = chunk * model.vocabulary * (4 + 4 + (work.compute_bytes if work.compute_bytes < 4 else 0))
    copy = model.head_parameters * work.compute_bytes if work.compute_bytes < 4 else 0
    # The head's gradient is summed in float32 over chunks, whole; without shards it is counted as a gradient already.
    return logits * (1 if train_head else 2) + copy + (4 * model.head_parameters if train_head and sharded else 0)


def _communication_bytes(model: ModelFacts, work: Workload, layout: Layout, tokens: float) -> float:
    if layout.gpus == 1:
        return 0.0
    number, size = work.compute_bytes, 0.0
    if layout.sharded:
        gathered, full = work.gathered_bytes, work.gated is None
        routed = model.experts * model.expert_parameters
        layer = model.largest_layer - routed + routed / layout.expert_parallel
        # One layer runs while the next one is gathered; gradients of one wait to be summed.
        size += layer * gathered * (3 if full else 2)
        size += model.head_parameters * gathered * (2 if full else 1)
        if gathered > number:  # autocast's copies, which the backward pass keeps
            size += number * (
                layer if work.gradient_checkpointing else model.shared_parameters + routed * model.moe_layers
            )
    if layout.context_parallel > 1:
        # Clean keys and values of one layer, of the whole row, and their gradient.
        width = max((cache.width for cache in model.caches), default=2 * model.keys)
        size += 2 * work.micro_batch_size * work.sequence_len * width * number
    if layout.expert_parallel > 1:
        # Tokens sent to experts of other devices and what comes back.
        size += 2 * tokens * model.experts_per_token * model.hidden * number
    return size
