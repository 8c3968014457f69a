"""What the planner foretells, measured on the real modules: parameters, FLOPs, tensors that autograd keeps.

Batches are made by the real inputs from samples that fill their rows.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import RunConfig
from tests.families import batch_of, task_of


def storages(module: nn.Module, batch: dict[str, Tensor]) -> set[int]:
    """Memory that is there before the forward."""
    tensors = [*module.parameters(), *module.buffers(), *batch.values()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Kept:
    """A tensor in the graph: alive as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(config: RunConfig, rows: int) -> int:
    """Of the tensors that wait for the backward: each memory once, without parameters and the batch."""
    module, batch = task_of(config), batch_of(config, rows, full=True)
    there, graph = storages(module, batch), weakref.WeakSet[Kept]()

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        graph.add(kept)
        return kept

    low = config.train.precision == "bf16"
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, low):
        loss = module(batch)["loss"]
    alive = [kept.tensor.untyped_storage() for kept in graph]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    assert loss.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in there)


def held_bytes(config: RunConfig, rows: int) -> int:
    """Of all that a forward leaves alive for its backward, in whatever way: without parameters and the batch."""
    module, batch = task_of(config), batch_of(config, rows, full=True)
    with Live() as live, torch.autocast("cpu", torch.bfloat16, config.train.precision == "bf16"):
        loss = module(batch)["loss"]
    assert loss.requires_grad
    return live.now


def flops(config: RunConfig, rows: int) -> tuple[int, int]:
    """-> (forward, forward and backward) by torch's own counter, attention as plain products."""
    module, batch = task_of(config), batch_of(config, rows, full=True)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = module(batch)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def parameters(config: RunConfig) -> int:
    """Elements of all parameters, on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in task_of(config).parameters())


class Live(TorchDispatchMode):
    """Bytes of the memory that operations make, as long as it lives; `peak`: the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, dict[int, weakref.ref[torch.UntypedStorage]]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and note what is new."""
        made = operation(*args, **(kwargs or {}))
        tensors = [thing for thing in tree_leaves(made) if isinstance(thing, Tensor)]
        old = {thing.untyped_storage()._cdata for thing in tree_leaves((args, kwargs)) if isinstance(thing, Tensor)}
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self.known and storage._cdata not in old:
                self._count(storage, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        def gone(_: object) -> None:
            self.now -= size
            del self.known[key]

        self.now += size
        self.known[key] = weakref.ref(storage, gone)


def peak_bytes(config: RunConfig, rows: int) -> int:
    """The most that a forward and its backward hold, gradients of parameters among it, parameters and batch not."""
    module, batch = task_of(config), batch_of(config, rows, full=True)
    low = config.train.precision == "bf16"
    with Live() as live:
        with torch.autocast("cpu", torch.bfloat16, low):
            loss = module(batch)["loss"]
        loss.backward()
    return live.peak
