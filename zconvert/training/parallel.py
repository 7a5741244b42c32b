"""The processes of a run, and all that this project knows of torch.distributed and of transformers' own sharding.

`torchrun` or `accelerate launch` start the processes and describe them in the environment; without them there is one,
and nothing here does anything. Weights are sharded by FSDP2 as they are loaded (`transformers.distributed`), layer by
layer, and the rest of the model, embeddings and head, in one piece: it is gathered once a forward, so that the loss may
use the head as often as it likes.

    8 processes, fsdp 4, context_parallel 2:

    process             0 1 2 3 | 4 5 6 7
    shard of weights    0 1 2 3 | 0 1 2 3      two replicas
    rows of the step    0 0 1 1 | 2 2 3 3
    part of each row    0 1 0 1 | 0 1 0 1
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zconvert.checkpoint.anatomy import experts_of
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import Source, read_config
from zconvert.errors import UserError
from zconvert.recipe.parallel import ParallelRecipe
from zconvert.tidar.families import language_config
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.model import LayoutModel
from zconvert.training.context_parallel import ContextParallel

T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)
"""a large model is loaded in tens of minutes, and not by all processes at the same pace"""


class Parallel:
    """The processes of a run, seen by one of them."""

    def __init__(self, recipe: ParallelRecipe | None = None) -> None:
        """Joins the other processes that the launcher started.

        Args:
            recipe: the `parallel:` section.

        Raises:
            UserError: the section does not fit the number of processes.
        """
        self.recipe = recipe = recipe or ParallelRecipe()
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        """processes of the run"""
        self.rank = int(os.environ.get("RANK", "0")) if self.world > 1 else 0
        """this one's number, from 0"""
        self.fsdp = recipe.fsdp or self.world
        """processes that hold one copy of the weights"""
        self.context = recipe.context_parallel
        """processes that share a row"""
        self.data_world, self.data_rank = self.world // self.context, self.rank // self.context
        """groups of processes with rows of their own, and which is this one's"""
        self.context_parallel: ContextParallel | None = None
        """this process's place among those that share its rows"""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.world == 1:
            check_sizes(recipe, self.world)
            return
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self._joined = not dist.is_initialized()
        if self._joined:
            bound = self.device if self.device.type == "cuda" else None
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_TIMEOUT, device_id=bound)
        check_sizes(recipe, self.world)  # only now, so that one of them can speak for all: see `first_to_fail`
        if self.context > 1:
            group, _ = dist.new_subgroups(self.context)
            self.context_parallel = ContextParallel(group, self.rank % self.context, self.context)

    @property
    def first(self) -> bool:
        """This process speaks for all: it reports, and writes what is written once."""
        return self.rank == 0

    def close(self) -> None:
        """Leaves the other processes, if joining them was done here."""
        if self.world > 1 and self._joined:
            dist.destroy_process_group()

    # The model

    def load(self, source: Source, dtype: str = "float32") -> tuple[Any, Any]:
        """Loads a checkpoint: the model, of which this process holds its shard, and its tokenizer.

        Args:
            source: the checkpoint.
            dtype: auto keeps the number format of its files.

        Raises:
            UserError: see `load_model`, `check_experts`; or transformers is too old for several processes.
        """
        if self.world == 1:
            return load_model(source, dtype=dtype, device=self.device.type)
        check_experts(source, self.recipe.expert_parallel)
        config = sharding(self.fsdp, self.world // self.fsdp, self.recipe.expert_parallel)
        with _layer_by_layer():
            model, tokenizer = load_model(source, dtype=dtype, sharding=config)
        _make_runnable(model)
        return model, tokenizer

    def layout_model(self, model: Any, *, gated: bool) -> LayoutModel:
        """The model behind layouts.

        Args:
            model: from `load`.
            gated: whether its weights are frozen, and weights are added that act at mask slots; those are not sharded.
        """
        if gated:
            model.requires_grad_(False)
        self.run(model, lambda: {"made": layout_model_of(model)})  # new weights start from the embeddings
        self.rest(model)
        made = layout_model_of(model)
        if self.context_parallel is not None:
            self.context_parallel.attach(made)
        for parameter in made.gated.parameters() if made.gated is not None and self.world > 1 else ():
            dist.broadcast(parameter.data, 0)
        return made

    def run(self, model: Any, forward: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Calls `forward`, which runs parts of the model, as if it were the model's own forward.

        Args:
            model: from `load`.
            forward: returns tensors by name; those with a gradient are where the backward pass starts.
        """
        return forward() if self.world == 1 else model.run_sharded(forward)

    def alone(self, model: LayoutModel, action: Callable[[], T]) -> T:
        """Calls `action`, in which every process runs the model over whole rows, without gradients.

        Args:
            model: from `layout_model`.
            action: the same in every process that shares weights, so that all gather the same layers.
        """
        found: list[T] = []
        config, kept = model.config, model.config._attn_implementation
        if self.context_parallel is not None:
            config._attn_implementation = self.context_parallel.implementation
        try:
            self.run(model.model, lambda: found.append(action()) or {})  # type: ignore[func-returns-value]
        finally:
            config._attn_implementation = kept
        self.rest(model.model)
        return found[0]

    def sync_gradients(self, model: Any, *, last: bool) -> None:
        """Says whether the next backward pass is the step's last one, after which gradients are summed."""
        if self.world > 1:
            model.set_requires_gradient_sync(last or self.recipe.sync_every_forward)

    @property
    def loss_scale(self) -> int:
        """Factor of this process's part of the loss, whose parts add up: gradients are averaged over processes."""
        return self.world

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Averages the gradients of parameters that are not sharded, which FSDP does not know of."""
        if self.world == 1:
            return
        # A process without a scored token may have no gradient; all join in all the same.
        whole = [p for p in parameters if p.requires_grad and not _is_sharded(p)]
        if not whole:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for p, mean in zip(whole, flat.split([g.numel() for g in gradients]), strict=True):
            p.grad = mean.view_as(p)

    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> float:
        """Scales gradients down to a norm over all parameters and processes; returns the norm before."""
        parameters = [p for p in parameters if p.grad is not None]
        if self.world == 1:
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        # Parameters of several meshes (experts have their own) cannot be in one list.
        groups: dict[Any, list[Tensor]] = {}
        for p in parameters:
            groups.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
        gradients = ([p.grad for p in group if p.grad is not None] for group in groups.values())
        norms = [_full(torch.nn.utils.get_total_norm(group)) for group in gradients]
        total = torch.linalg.vector_norm(torch.stack(norms))
        for group in groups.values():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
        return total.item()

    # The train state

    def write_tensors(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Writes tensors into a folder, each process its shards, in files that hold no code.

        Raises:
            OSError: the disk is full or not writable; the same in all processes.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True, enable_consolidation=False)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.save(_contiguous_shards(tensors), storage_writer=writer, no_dist=self.world == 1)
        except dcp.CheckpointException as failure:
            raise OSError(_causes(failure)) from failure

    def read_tensors(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Overwrites tensors with those of `write_tensors`, whatever number of processes wrote them.

        Raises:
            ValueError: a tensor is not there, or has another shape.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        shards = _contiguous_shards(tensors)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(shards, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=self.world == 1)
        except dcp.CheckpointException as failure:
            raise ValueError(_causes(failure)) from failure
        with torch.no_grad():
            for name, tensor in tensors.items():
                if shards[name] is not tensor:
                    tensor.copy_(shards[name].redistribute(placements=tensor.placements))  # type: ignore[attr-defined]

    def rest(self, model: Any) -> None:
        """Gives back what a forward without a backward pass left gathered, so that the model is its shards."""
        if self.world > 1:
            model.reshard()

    # Words among the processes

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums of each number over all processes."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def summed(self, counts: Tensor) -> Tensor:
        """The tensor, in place, summed over all processes."""
        if self.world > 1:
            dist.all_reduce(counts)
        return counts

    def gather(self, item: T) -> list[T]:
        """What every process says, by rank; plain Python objects."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def together(self, action: Callable[[], T]) -> list[T]:
        """Does something in every process, and returns what came of it by rank.

        Raises:
            OSError, UserError: it failed in this or in another process; the same in all.
        """
        if self.world == 1:
            return [action()]
        error: Exception | None = None
        result: Any = None
        try:
            result = action()
        except (OSError, UserError) as failure:
            error = failure
        results = self.gather((result, error))
        for _, problem in results:
            if problem is not None:
                raise problem
        return [value for value, _ in results]

    def gathered(self, tensor: Tensor) -> Tensor:
        """The whole of a sharded tensor, in every process; all must ask for the same ones in the same order."""
        return _full(tensor.detach())


def first_to_fail(error: Exception) -> bool:
    """Whether an error is the cause why a run fails: other processes fail in its wake, and should keep quiet."""
    if not dist.is_initialized():
        return True
    if lost_the_others(error):
        return False
    try:
        return dist.distributed_c10d._get_default_store().add("zconvert/failed", 1) == 1
    except Exception:  # the process that keeps the store is gone: it was the first
        return False


def lost_the_others(error: Exception) -> bool:
    """Whether an error says that another process of the run is gone."""
    return isinstance(error, dist.DistError) or bool(re.search("gloo|Connection (?:closed|reset)", str(error)))


def _make_runnable(model: Any) -> None:
    """Gives a sharded model the method that `Parallel.run` calls, with FSDP's work before and after it."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    model.run_sharded = lambda forward: forward()
    register_fsdp_forward_method(model, "run_sharded")


def check_sizes(recipe: ParallelRecipe, world: int) -> None:
    """Compares the section with the number of processes.

    Raises:
        UserError: it does not fit.
    """
    fsdp = recipe.fsdp or world
    for name, size, whole in (
        ("fsdp", fsdp, world),
        ("context_parallel", recipe.context_parallel, world),
        ("expert_parallel", recipe.expert_parallel, fsdp),
    ):
        if whole % size:
            raise UserError(
                f"parallel.{name} is {size}, but there {'is 1 process' if world == 1 else f'are {world} processes'}",
                expected=f"a divisor of {whole}" if whole > 1 else "1",
                fix=f"change it, or start other processes: zconvert STAGE RECIPE.yaml -- --nproc_per_node={size}",
            )


def check_experts(source: Source, size: int) -> None:
    """Compares `expert_parallel` with a checkpoint's experts.

    Raises:
        UserError: they cannot be shared among so many.
    """
    if size == 1:
        return
    from transformers import AutoConfig

    text = language_config(read_config(source.folder))
    plan = AutoConfig.from_pretrained(source.folder, local_files_only=True).get_text_config().base_model_ep_plan
    experts = (experts_of(text) or {}).get("num")
    if plan and experts and experts % size == 0:
        return
    shared = plan and experts
    raise UserError(
        f"the experts of {source.name} cannot be shared: parallel.expert_parallel is {size}",
        found=f"{experts} experts" if shared else f"{text['model_type']}, for which transformers has no plan",
        expected=f"a divisor of {experts}" if shared else "1",
        fix="change it; fsdp shares the experts' weights too",
    )


def sharding(fsdp: int, replicas: int, experts: int) -> Any:
    """How transformers is to share a model.

    Args:
        fsdp: processes that hold one copy of the weights.
        replicas: copies.
        experts: processes that share a layer's experts.

    Raises:
        UserError: it is too old to know.
    """
    import transformers

    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(fsdp_size=fsdp, dp_replicate_size=replicas, ep_size=experts)
    except (ImportError, TypeError) as error:
        raise UserError(
            "training in several processes needs a newer transformers",
            found=f"transformers {transformers.__version__}",
            expected="5.23 or newer; one process trains with older ones too",
            fix="pip install --upgrade transformers",
        ) from error


def _is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _causes(failure: Any) -> str:
    return "; ".join(sorted({str(error) for error, _ in failure.failures.values()}))


def _contiguous_shards(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts may be sharded twice in the same dimension, which torch's checkpoints cannot describe."""
    if not dist.is_initialized():
        return tensors
    from transformers.distributed.checkpoint import _redistribute_state_dict

    return _redistribute_state_dict(tensors)


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Has transformers shard the decoder's layers apart, and all the rest of the model in one piece.

    By its own plan the head is a unit of its own, gathered and reduced anew for every chunk of the loss.
    """
    from transformers.distributed.mixin import DistributedMixin

    stock = DistributedMixin._resolve_parallel_plans

    def resolve(self: Any, config: Any) -> Any:
        tensor_plan, expert_plan, plan = stock(self, config)
        in_layers = re.compile(r"(?:^|\.)(?:layers|blocks)\.\d+(?:\.|$)")
        return tensor_plan, expert_plan, {name: kind for name, kind in plan.items() if in_layers.search(name)}

    DistributedMixin._resolve_parallel_plans = resolve  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DistributedMixin._resolve_parallel_plans = stock  # type: ignore[method-assign]
