"""Trace the real task without data: parameters, FLOPs, and bytes saved for the backward, held and moved.

Tensors have a shape and a dtype but no memory (see `device`). A Recorder sees every operation of a forward and its
backward. Imports torch: only `launchers.plan.make` imports this module, when it plans.
"""

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from data_pipeline.errors import ConfigError
from launchers.plan.device import META, PlannedDevice
from launchers.plan.figures import FP32, Figures, Traced, Weight
from pretrain.config import RunConfig
from pretrain.engine.optim import NO_GRADIENT, check_names, freeze
from pretrain.inputs.shapes import batch_shapes
from pretrain.models import MODELS
from pretrain.models.layers import Block, recompute
from pretrain.models.noise import noise_of
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import Collectives

LOW_PRECISION_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""DeepSpeed communicates the parameters of these classes, not of their subclasses, in autocast's dtype."""
Batch = dict[str, Tensor]


def trace(config: RunConfig, rows: int, accumulation: int, world: int, on_gpu: bool, step: int = 0) -> Traced:
    """Trace a step of one of `world` ranks, in micro-batches of `rows` samples."""
    task = TracedTask(config, world, on_gpu, step)
    micro = first = whole = Figures()
    kept = 0.0
    roles = task.turns(step)
    for role in roles:
        task.learn(role)
        batch = task.batch(rows, role)
        if accumulation > 1 and task.module.compares_batch:
            cached = task.cached(batch, rows, accumulation, role)
            first, whole, kept = first.then(cached.first), whole.then(cached.whole), max(kept, cached.kept)
            batch |= cached.more
        micro = micro.then(task.forward_and_backward(batch))
    later = tuple(role for role in task.turns(config.train.steps - 1) if role not in roles)
    return Traced(task.weights(), task.low, on_gpu, rows, micro, first, whole, kept, later)


class Cached(NamedTuple):
    """Costs of gradient caching. kept: bytes cached of all micro-batches; more: what it adds to one's batch."""

    first: Figures
    whole: Figures
    kept: float
    more: Batch


class TracedTask:
    """The task of a run on a planned device."""

    def __init__(self, config: RunConfig, world: int, on_gpu: bool, step: int) -> None:
        self.config, self.step = config, step
        self.low = 2 if config.train.precision == "bf16" else FP32
        self.device = PlannedDevice(on_gpu, torch.bfloat16 if self.low != FP32 else None)
        self.ranks = Ranks(world)
        collectives = Collectives(self.ranks.gather, lambda x: x.detach().clone(), world)
        with META:
            model = MODELS[config.model.kind](config.model)
            if config.train.recompute:
                recompute(model)
                for block in (module for module in model.modules() if isinstance(module, Block)):
                    self.device.stay_in(block)
            self.module = TASKS[config.task.kind](model, config.task, collectives).train()
        check_names(self.module, config.optim)
        freeze(self.module, config.optim, config.train.steps - 1)
        self.trained = {id(parameter) for parameter in self.module.parameters() if parameter.requires_grad}

    def weights(self) -> tuple[Weight, ...]:
        """Return every parameter."""
        low = {
            id(parameter)
            for module in self.module.modules()
            if module.__class__ in LOW_PRECISION_MODULES
            for parameter in module.parameters(recurse=False)
        }
        return tuple(
            Weight(parameter.numel(), id(parameter) in low, id(parameter) in self.trained)
            for parameter in self.module.parameters()
        )

    def turns(self, step: int) -> tuple[str, ...]:
        """Return the optimizer roles that take a turn in this step, in order."""
        return self.module.turns(step)

    def learn(self, role: str) -> None:
        """Require gradients of this role's parameters only, from now on, except for those that are frozen."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(id(parameter) in self.trained and self.module.role_of(name) == role)
            parameter.grad = None

    def batch(self, rows: int, role: str) -> Batch:
        """Return a batch of samples of the largest size."""
        numbers = {"step": torch.tensor(self.step), "turn": torch.tensor(self.module.roles.index(role))}
        shapes = batch_shapes(self.config, self.module.keys, rows, self.module.shapes).items()
        return numbers | {key: torch.empty(sizes, dtype=dtype, device=META) for key, (sizes, dtype) in shapes}

    def forward_and_backward(self, batch: Batch) -> Figures:
        """Trace the forward and backward of one micro-batch."""
        with self._recorded(batch) as recorder:
            loss = self._forward(batch)["loss"]
            if not loss.requires_grad:
                raise ConfigError(NO_GRADIENT)
            recorder.turn_back()
            loss.backward()
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return recorder.figures(gradients)

    def cached(self, batch: Batch, rows: int, accumulation: int, role: str) -> "Cached":
        """Trace gradient caching: the work before the first micro-batch's backward, and what it adds to the batch.

        Two parts represent all micro-batches of a rank: their number does not change what the loss computes.
        """
        embed = {"embed": torch.tensor(1)}
        half = rows * accumulation // 2
        with torch.no_grad(), self._recorded(batch) as first:
            of_micro = self._forward(batch | embed)
        with torch.no_grad(), self.device:
            parts = [self._forward(self.batch(size, role) | embed) for size in (half, rows * accumulation - half)]
        with self.device:
            more = self.module.slopes([of_micro] * 2)[0]
        with self._recorded({}, *parts) as whole:
            self.module.slopes(parts)
        size = sum(tensor.nbytes for tensor in (*of_micro.values(), *more.values()))
        return Cached(first.figures(), whole.figures(), float(accumulation * size), more)

    def _forward(self, batch: Batch) -> Batch:
        """Call the module as the engine does."""
        with noise_of(batch.get("noise"), batch.get("places")), self.device.autocast():
            result: Batch = self.module(batch)
        return result

    @contextlib.contextmanager
    def _recorded(self, batch: Batch, *besides: Batch) -> Iterator["Recorder"]:
        """Record the operations within; besides: tensors that exist already."""
        self.ranks.clear()
        low = [weight.low for weight in self.weights()]
        weights = {_key(parameter): low for parameter, low in zip(self.module.parameters(), low, strict=True)}
        recorder = Recorder(weights, batch, self.ranks)
        recorder.there.update(_key(tensor) for each in besides for tensor in each.values())
        model = self.module.get_submodule("model")
        hooks = [model.register_forward_pre_hook(recorder.enter), model.register_forward_hook(recorder.leave)]
        with self.device, recorder:
            yield recorder
        for hook in hooks:
            hook.remove()


class Ranks:
    """Simulated collectives of one of `world` ranks: the resulting shapes, and the bytes gathered and returned."""

    def __init__(self, world: int) -> None:
        self.world, self.gathered, self.returned = world, 0, 0

    def clear(self) -> None:
        """Reset the counts."""
        self.gathered = self.returned = 0

    def gather(self, x: Tensor) -> Tensor:
        """[b, ...] -> [world * b, ...]."""
        return _PlannedGather.apply(x, self) if self.world > 1 else x


class _PlannedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        whole = x.new_empty(ranks.world * len(x), *x.shape[1:])
        ranks.gathered += whole.nbytes
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        ctx.ranks.returned += total.nbytes
        return total[: len(total) // ctx.ranks.world], None


# ------------------------------------------------------------------------------------------- the recorder


def _key(tensor: Tensor) -> int:
    """Return a key of the tensor's storage, unique while the storage lives."""
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclasses.dataclass
class Allocation:
    """One storage. made_by: "layers", "loss", "copies" or "copies_low"; watch: a weak reference that notes its end."""

    size: int
    made_by: str
    watch: Any = None


class Recorder(TorchDispatchMode):
    """Records what every operation computes, reads, writes and allocates.

    weights: storage key -> whether DeepSpeed communicates the weight in autocast's dtype.
    """

    def __init__(self, weights: dict[int, bool], batch: Batch, ranks: Ranks) -> None:
        super().__init__()
        self.weights, self.ranks = weights, ranks
        self.batch = sum(tensor.nbytes for tensor in batch.values())
        self.only_tokens = "pixels" not in batch
        self.there = {*weights, *map(_key, batch.values())}
        self.alive: dict[int, Allocation] = {}
        self.events: list[tuple[Allocation, int]] = []
        self.kept: list[Allocation] | None = None
        self.inside, self.back, self.model_end, self.tokens = False, False, -1, 0
        self.work = dict.fromkeys(("forward", "backward", "repeated", "outside", "moved", "moved_back"), 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: skipping torch's compiler would import it, which takes seconds; nothing here uses it."""
        return False

    def enter(self, *_: Any) -> None:
        """Note the start of the model's forward."""
        self.inside = True

    def leave(self, *_: Any) -> None:
        """Note its end; autograd nodes created until now are the model's."""
        self.inside, self.model_end = False, torch._C._autograd._get_sequence_nr()

    def turn_back(self) -> None:
        """Note the end of the forward: storages alive now are saved for the backward."""
        self.kept, self.back = list(self.alive.values()), True

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record it."""
        with torch._C.DisableTorchFunction():
            return self._noted(operation, args, kwargs or {})

    def _noted(self, operation: Any, args: Any, kwargs: Any) -> Any:
        made = operation(*args, **kwargs)
        read, written = _tensors((args, kwargs)), _tensors(made)
        old = {_key(tensor) for tensor in read}
        new = [tensor for tensor in written if _key(tensor) not in old]
        by = self._maker(operation, read)
        if not self._count(operation, args, kwargs, made) and (new or _writes(operation)) and by in ("layers", "loss"):
            self.work["moved_back" if self.back else "moved"] += sum(tensor.nbytes for tensor in read + written)
        for tensor in new:
            if _key(tensor) not in self.alive and _key(tensor) not in self.there:
                self._note(tensor, by)
        return made

    def _count(self, operation: Any, args: Any, kwargs: Any, made: Any) -> bool:
        """Count the operation's FLOPs; return whether it has a formula for them."""
        packet = operation._overloadpacket
        if packet is torch.ops.aten.embedding and self.only_tokens:
            self.tokens = max(self.tokens, args[1].numel())
        if packet in FLOPS:
            self.work[self._kind()] += FLOPS[packet](*args, **kwargs, out_val=made)
        return packet in FLOPS

    def _kind(self) -> str:
        """Return the kind of the current work; in a backward, grad mode is on only while a forward is recomputed."""
        node = torch._C._current_autograd_node() if self.back else None
        if not (self.inside if node is None else node._sequence_nr() < self.model_end):
            return "outside"
        if not self.back:
            return "forward"
        return "repeated" if torch.is_grad_enabled() else "backward"

    def _maker(self, operation: Any, read: list[Tensor]) -> str:
        if operation._overloadpacket is torch.ops.aten._to_copy and _key(read[0]) in self.weights:
            return "copies_low" if self.weights[_key(read[0])] else "copies"
        return "layers" if self.inside else "loss"

    def _note(self, tensor: Tensor, made_by: str) -> None:
        storage = tensor.untyped_storage()
        key, memory = storage._cdata, Allocation(storage.nbytes(), made_by)
        self.alive[key] = memory
        self.events.append((memory, memory.size))

        def gone(_: object) -> None:
            self.events.append((memory, -memory.size))
            del self.alive[key]

        memory.watch = weakref.ref(storage, gone)

    def figures(self, gradients: list[Tensor] | None = None) -> Figures:
        """Return the recorded figures. gradients: of parameters, which are counted elsewhere."""
        kept = {"layers": 0, "loss": 0, "copies": 0, "copies_low": 0}
        for memory in self.kept or []:
            kept[memory.made_by] += memory.size
        besides = {id(self.alive[_key(tensor)]) for tensor in gradients or [] if _key(tensor) in self.alive}
        most = {
            name: _most(
                change for memory, change in self.events if memory.made_by in made and id(memory) not in besides
            )
            for name, made in {"cast": ["copies"], "cast_low": ["copies_low"], "others": ["layers", "loss"]}.items()
        }
        temporary = max(0, most.pop("others") - kept["layers"] - kept["loss"])
        sent = {"gathered": self.ranks.gathered, "returned": self.ranks.returned}
        return Figures(**self.work, **kept, **most, **sent, temporary=temporary, batch=self.batch, tokens=self.tokens)


def _most(changes: Iterable[int]) -> int:
    """Return the peak of the running sum."""
    return max(itertools.accumulate(changes), default=0)


def _writes(operation: Any) -> bool:
    """Return whether the operation changes one of its inputs."""
    return any(
        argument.alias_info is not None and argument.alias_info.is_write for argument in operation._schema.arguments
    )


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **named: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_back(
    gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **named: Any
) -> int:
    return 2 * int(sdpa_flop_count(query.shape, key.shape, value.shape))


ATTENTION = ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
FLOPS: dict[Any, Any] = dict(flop_registry)
"""Torch's formulas; attention counts as plain matmuls, without what its kernels recompute."""
for _name in ATTENTION:
    _stem, _cpu, _ = _name.partition("_for_cpu")
    FLOPS[getattr(torch.ops.aten, f"_scaled_dot_product_{_name}")] = _attention
    FLOPS[getattr(torch.ops.aten, f"_scaled_dot_product_{_stem}{_cpu}_backward")] = _attention_back
