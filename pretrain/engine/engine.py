"""DeepSpeed set-up and step: ZeRO stages 0 to 3 behind the same few calls, on CPU and CUDA.

Works around defects of DeepSpeed 0.19, each with a test in tests/pretrain/engine/test_engine.py: gradients left over
from the previous step (stage 3), ranks that run different modules (silently mixed weights), 0-dim parameters (broken
initialisation), bf16 at stage 0 (a different, less accurate path: autocast is used at every stage instead), and
operators compiled for minutes on first use.

If a task has several roles, all its optimizers are groups of one AdamW, and each DeepSpeed step updates one role. The
other roles' parameters do not require gradients meanwhile, so they add zero to norm and clipping. Their groups are
hidden from AdamW, which would otherwise still decay their weights and update their moments.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError, NodeFault
from pretrain.config import RunConfig
from pretrain.engine.optim import NO_GRADIENT, build_optimizer, freeze, parameter_groups
from pretrain.engine.sharding import settings_of
from pretrain.models.noise import noise_of
from pretrain.runtime.mesh import Mesh
from pretrain.schema.common import MAIN

if TYPE_CHECKING:
    from pretrain.tasks.task import Task

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"
"""Exponential moving average of the weights, kept with the optimizer's state: float32, of what trains only."""
HYPER_PARAMETERS = ("weight_decay", "betas", "eps")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclasses.dataclass(frozen=True)
class Owned:
    """The part [lo, hi) of one flattened parameter that this rank keeps: writable float32 views [hi - lo].

    replicated: every rank keeps the same whole parameter. A frozen parameter has no moments.
    """

    name: str
    shape: tuple[int, ...]
    lo: int
    hi: int
    tensors: dict[str, Tensor]
    replicated: bool = False

    def begin(self, kinds: Sequence[str]) -> None:
        """Set these kinds of optimizer state, if there are any, to their values before the first update."""
        for kind in self.tensors.keys() & set(kinds):
            self.tensors[kind].copy_(self.tensors["param"]) if kind == AVERAGE else self.tensors[kind].zero_()


class Engine:
    """A task wrapped in DeepSpeed.

    Calls in a step: accumulate; for each turn take_turn, forward and backward (per micro-batch), update; then settle.
    """

    def __init__(
        self, task: "Task", config: RunConfig, mesh: Mesh, micro_batch: int, accumulation: int, step: int = 0
    ) -> None:
        """step: steps made; parameters that `optim.freeze` freezes in the next one get no optimizer state."""
        refuse_scalars(task)
        freeze(task, config.optim, step)
        self.mesh = mesh
        self.step = step
        self._made_of = (config, mesh, micro_batch, accumulation)
        self.stage = config.train.zero_stage
        self.kinds = (*MOMENTS, AVERAGE) if config.optim.ema else MOMENTS
        self.role = MAIN
        self._replaced: list[tuple[Tensor, Tensor]] = []
        self._norm: float | None = None
        self._accepts: Callable[[float], bool] = math.isfinite
        self._verdict: bool | None = None
        # Any: DeepSpeed adds ds_tensor, ds_shape and _hp_mapping to nn.Parameter.
        self.names: dict[Any, str] = {parameter: name for name, parameter in task.named_parameters()}
        self.trace = ModuleTrace(task)
        deepspeed = _quiet_deepspeed()
        groups = self.groups = parameter_groups(task, config.optim, step)
        self.roles = task.roles
        settings = deepspeed_settings(config, task, mesh.world, micro_batch, accumulation)
        warn_of_emulation(config, mesh)
        task.to(mesh.device)
        self.deepspeed, *_ = deepspeed.initialize(
            model=task, optimizer=build_optimizer(groups), config=settings, dist_init_required=False
        )
        self.resident = _take_resident(self.deepspeed.optimizer) if self.stage == 3 else []
        self.changing = [parameter for parameter in self.resident if parameter.requires_grad]
        self._guard_optimizer()
        if AVERAGE in self.kinds:
            self._make_moments()  # before the first update

    def accumulate(self, batches: int) -> None:
        """Average the gradient of a turn over so many micro-batches, at a step whose batch has another size."""
        settings = self.deepspeed._config
        if settings.gradient_accumulation_steps != batches:
            settings.gradient_accumulation_steps = batches
            self.deepspeed.micro_steps = 0  # DeepSpeed finds the last micro-batch by counting all so far
            if self.stage > 0:
                self.deepspeed.optimizer.gradient_accumulation_steps = batches

    def take_turn(self, role: str, keep: bool = False) -> None:
        """Train only the parameters of `role` until the next `update`. keep: allow `settle` to undo that update."""
        self.role = role
        if keep:
            self._replaced += [(tensor, tensor.clone()) for tensor in self._state_of(role)]
        self._learn((role,))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch on this rank -> named losses; "loss" is the one to differentiate."""
        self.trace.on = True  # excludes what one rank runs outside the step, such as a preview
        try:
            there = {name: tensor.to(self.mesh.device) for name, tensor in batch.items()}
            with noise_of(there.get("noise"), there.get("places")):
                return self.deepspeed(there)
        finally:
            self.trace.on = False

    @torch.no_grad()
    def evaluate(self, compute: Callable[[dict[str, Tensor]], dict[str, Tensor]], batch: dict[str, Tensor]) -> Any:
        """Return `compute(batch)` on the CPU, in evaluation mode, without gradient and in float32.

        `compute` may call any part of the task. It runs in place of the task's `forward`: under ZeRO-3 sharded weights
        are gathered only within a call of the whole task. All ranks must take part, with the same modules in order.
        """
        task = self.deepspeed.module
        there = {name: tensor.to(self.mesh.device) for name, tensor in batch.items()}
        task.forward = torch.autocast(self.mesh.device.type, enabled=False)(compute)
        task.eval()
        try:
            return {name: tensor.cpu() for name, tensor in self.deepspeed(there).items()}
        finally:
            del task.forward
            task.train()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the mean over micro-batches.

        Raises ConfigError if the loss depends on no parameter that trains, which `optim.freeze` can cause.
        """
        if not loss.requires_grad:
            raise ConfigError(NO_GRADIENT)
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def update(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        """Clip, step AdamW at rate `lr`, clear gradients -> global gradient norm of this turn's role before clipping.

        If `accepts(norm)` is false, the gradient is cleared without being applied.
        """
        self._accepts, self._verdict = accepts, None
        self.trace.check(self.mesh)
        # At stage 0 DeepSpeed clips without exposing the norm.
        grads = [parameter.grad for parameter in self.names if parameter.grad is not None] if self.stage == 0 else []
        self._norm = float(torch.nn.utils.get_total_norm(grads)) if self.stage == 0 else None
        for group in self._base_optimizer().param_groups:
            if group["role"] == self.role:
                group["lr"] = lr * group["lr_scale"]
        self.deepspeed.step()
        if self.stage == 3:
            # DeepSpeed never clears these partitions: a parameter without a gradient in the first micro-step of the
            # next step would be updated with this step's gradient again.
            self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
            _gather(self.changing)
        self._learn(self.roles)
        self._accepted()  # on an overflow DeepSpeed skips the optimizer, where this is otherwise called
        return self._global_norm()

    @torch.no_grad()
    def settle(self, accepted: bool) -> None:
        """End the step: if it was refused, undo the changes of all turns that were taken with `keep`."""
        if self._replaced and not accepted:
            for tensor, before in self._replaced:
                tensor.copy_(before)
            self.refresh()
        self._replaced.clear()

    @torch.no_grad()
    def average(self, rate: float) -> None:
        """Set the average of the weights, if it is kept, to rate * average + (1 - rate) * weights, without traffic."""
        if AVERAGE in self.kinds:
            state, weights = self._base_optimizer().state, [tensor for _, tensor in self._optimized()]
            torch._foreach_lerp_([state[tensor][AVERAGE] for tensor in weights], weights, 1 - rate)

    def _learn(self, roles: tuple[str, ...]) -> None:
        """Require gradients only of the parameters of `roles`; frozen ones stay so. Does nothing with a single role."""
        if len(self.roles) > 1:
            for group in self.groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(group["role"] in roles)

    def _state_of(self, role: str) -> Iterator[Tensor]:
        """Yield all that an update of this role changes on this rank: masters, moments, update counts."""
        names = {name for group in self.groups if group["role"] == role for name in group["names"]}
        for owned in self.owned():
            if owned.name in names:
                yield from owned.tensors.values()
        for number, tensor in self._optimized():
            if self.groups[number]["role"] == role:
                yield self._base_optimizer().state[tensor]["step"]

    def _global_norm(self) -> float:
        return float(self.deepspeed.optimizer._global_grad_norm or 0.0) if self._norm is None else self._norm

    def _accepted(self) -> bool:
        """Evaluate `accepts` once per update: DeepSpeed steps the optimizer once for each group, or not at all."""
        if self._verdict is None:
            self._verdict = self._accepts(self._global_norm())
        return self._verdict

    def _guard_optimizer(self) -> None:
        """Wrap the base optimizer's step so that it runs only if the gradient is accepted.

        DeepSpeed computes the norm only inside its own step. The wrapped step sees only the groups of this turn's role.
        """
        optimizer = self._base_optimizer()
        step = optimizer.step

        def guarded() -> None:
            groups = optimizer.param_groups  # at some stages DeepSpeed shows it one group at a time
            optimizer.param_groups = [group for group in groups if group["role"] == self.role]
            if optimizer.param_groups and self._accepted():
                step()
            optimizer.param_groups = groups

        optimizer.step = guarded  # type: ignore[method-assign,assignment]

    # ---------------------------------------------------------------------------- state, as intervals

    def owned(self) -> list[Owned]:
        """Return writable views of what this rank keeps. At stage 0 every rank keeps every parameter whole."""
        self._make_moments()
        return [owned for parameter, name in self.names.items() for owned in self._owned_of(name, parameter)]

    def scalars(self) -> dict[str, Any]:
        """Return the optimizer's non-tensor state as plain JSON: groups by name, update counts, loss scale.

        Every group has its own update count, which AdamW's bias correction uses, because roles update separately.
        """
        state, counts = self._base_optimizer().state, [0] * len(self.groups)
        for number, tensor in self._optimized():
            counts[number] = int(state[tensor]["step"]) if state[tensor] else 0
        hyper = self._base_optimizer().param_groups
        groups = [
            {"number": number, "names": group["names"], "updates": count} | {k: theirs[k] for k in HYPER_PARAMETERS}
            for number, (group, count, theirs) in enumerate(zip(self.groups, counts, hyper, strict=True))
        ]
        plain = {group["name"]: row for group, row in zip(self.groups, groups, strict=True)}
        return dict(json.loads(json.dumps({"groups": plain, "loss_scale": self._loss_scale()})))

    def load_scalars(self, saved: dict[str, Any], where: str) -> None:
        """Restore the result of `scalars()`. Raises DataError if a group's members or settings differ from the saved.

        Restore tensors first: the state that holds the counts must exist.
        """
        now, fresh = self.scalars()["groups"], self._begun_since(saved)
        for name in sorted((saved["groups"].keys() | now.keys()) - fresh):
            before, after = saved["groups"].get(name, {}), now.get(name, {})
            wrong = [key for key in ("names", *HYPER_PARAMETERS) if before.get(key) != after.get(key)]
            if wrong:
                raise DataError(
                    f"{where}: parameter group {name} differs in {', '.join(wrong)}; resume with the revision and "
                    "settings that saved it, or start a new run from its weights with `initial`"
                )
        counts = [0 if group["name"] in fresh else saved["groups"][group["name"]]["updates"] for group in self.groups]
        for number, tensor in self._optimized():
            self._base_optimizer().state[tensor]["step"].fill_(counts[number])
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        for key, value in saved["loss_scale"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)

    def _begun_since(self, saved: dict[str, Any]) -> set[str]:
        """Return the groups that were still frozen when the result of `scalars()` was saved."""
        fresh = self.stateless(saved)
        return {group["name"] for group in self.groups if fresh.issuperset(group["names"])}

    def stateless(self, saved: dict[str, Any]) -> set[str]:
        """Return the names of the parameters that were still frozen then: their optimizer state begins at zero."""
        waited = {name for group in self.groups if group["first_step"] for name in group["names"]}
        return waited.difference(*(group["names"] for group in saved["groups"].values()))

    def _loss_scale(self) -> dict[str, Any]:
        """Return the mutable state of DeepSpeed's loss scaler; empty if there is none (stage 0)."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the working copies from the masters after writes to `owned()`. Collective: all ranks must call it."""
        if self.stage == 3:
            for parameter, name in self.names.items():
                for owned in self._owned_of(name, parameter):
                    parameter.ds_tensor.data.view(-1)[: owned.hi - owned.lo].copy_(owned.tensors["param"])
            if self.resident:
                self.resident[0].partition(self.resident)
                _gather(self.resident)
        elif self.stage in (1, 2):
            self.deepspeed.optimizer.update_lp_params()

    def rebuilt(self, task: "Task", step: int) -> "Engine":
        """Return an engine of what trains after `step` steps, with this one's state; this one cannot be used any more.

        task: a new one of the same kind; its weights are replaced. The engine equals one that resumes from a checkpoint
        of this step. Collective: all ranks must call it.
        """
        scalars, parts = self.scalars(), self._parts()
        buffers = {name: buffer.clone() for name, buffer in self.deepspeed.module.named_buffers()}
        self.deepspeed.destroy()
        new = Engine(task, *self._made_of, step)
        new._take_over(parts, scalars)
        for name, buffer in new.deepspeed.module.named_buffers():
            buffer.copy_(buffers[name])
        new.load_scalars(scalars, f"step {step}")
        return new

    def _parts(self) -> dict[str, Owned]:
        """Return host copies of what this rank keeps; of replicated tensors only those of rank 0, above stage 0."""
        spare = self.stage > 0 and self.mesh.rank > 0
        return {
            owned.name: dataclasses.replace(
                owned, tensors={k: t.to("cpu", copy=True) for k, t in owned.tensors.items()}
            )
            for owned in self.owned()
            if not (owned.replicated and spare)
        }

    @torch.no_grad()
    def _take_over(self, parts: dict[str, Owned], scalars: dict[str, Any]) -> None:
        """Copy an engine's `_parts` into this one. Only stages 1 and 2 cut the tensors elsewhere, for other groups."""
        moving = self.stage in (1, 2)
        held = {name for group in scalars["groups"].values() for name in group["names"]}
        here = {owned.name: owned for owned in self.owned()}
        for parameter, name in self.names.items():
            mine, old = here.get(name), parts.get(name)
            for kind in ("param", *(self.kinds if name in held else ())):
                was = self._moved(old, kind, parameter) if moving else old.tensors[kind] if old else None
                if mine is not None and was is not None:
                    lo = mine.lo if moving else 0
                    mine.tensors[kind].copy_(was[lo : lo + mine.hi - mine.lo])
            if mine is not None and name not in held:
                mine.begin(MOMENTS)
                mine.begin((AVERAGE,))
        self.refresh()

    def _moved(self, old: Owned | None, kind: str, parameter: nn.Parameter) -> Tensor:
        """Return the whole tensor [numel] from the parts of all ranks. Sums bits as integers: nothing rounds."""
        whole = torch.zeros(parameter.numel(), device=self.mesh.device)
        if old is not None:
            whole[old.lo : old.hi] = old.tensors[kind]
        return self.mesh.sum(whole.view(torch.int32)).view(torch.float32)

    def _owned_of(self, name: str, parameter: Any) -> Iterator[Owned]:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        size = torch.Size(shape).numel()
        if self.stage == 0:
            state = self._base_optimizer().state.get(parameter, {})
            sources = {"param": parameter.data} | {key: state[key] for key in self.kinds if key in state}
            yield Owned(name, shape, 0, size, {key: tensor.view(-1) for key, tensor in sources.items()}, True)
        elif self.stage == 3:
            yield from self._owned_partition(name, parameter, shape, size)
        elif not parameter.requires_grad:
            yield Owned(name, shape, 0, size, {"param": parameter.data.view(-1)}, True)
        elif getattr(parameter, "_hp_mapping", None) is not None:
            mapping = parameter._hp_mapping
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = self.deepspeed.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            state = self._base_optimizer().state[flat]
            sources = {"param": flat.data} | {key: state[key] for key in self.kinds}
            views = {key: tensor.narrow(0, there.start, there.numel) for key, tensor in sources.items()}
            yield Owned(name, shape, here.start, here.start + here.numel, views)

    def _owned_partition(self, name: str, parameter: Any, shape: tuple[int, ...], size: int) -> Iterator[Owned]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        part = parameter.ds_tensor.numel()
        lo, hi = min(self.mesh.rank * part, size), min((self.mesh.rank + 1) * part, size)
        if lo == hi:
            return
        if not parameter.requires_grad:
            yield Owned(name, shape, lo, hi, {"param": parameter.ds_tensor.data.view(-1)[: hi - lo]})
            return
        sources = {"param": safe_get_local_fp32_param(parameter)}
        sources |= {key: safe_get_local_optimizer_state(parameter, key) for key in self.kinds}
        yield Owned(name, shape, lo, hi, {key: tensor.view(-1)[: hi - lo] for key, tensor in sources.items()})

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.deepspeed.optimizer if self.stage == 0 else self.deepspeed.optimizer.optimizer

    def _optimized(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (group number, tensor that the base optimizer steps): parameters, or flat parts of them."""
        sharded = self.deepspeed.optimizer
        if self.stage == 0:
            for number, group in enumerate(sharded.param_groups):
                yield from ((number, parameter) for parameter in group["params"])
        elif self.stage == 3:
            for part, tensor in enumerate(sharded.fp32_partitioned_groups_flat):
                yield sharded.sub_group_to_group_id[part], tensor
        else:
            yield from enumerate(sharded.single_partition_of_fp32_groups)

    def _make_moments(self) -> None:
        """Create AdamW's moments now: AdamW itself creates them at the first step, too late for loading.

        The average of the weights begins at the weights.
        """
        optimizer = self._base_optimizer()
        for _, tensor in self._optimized():
            if not optimizer.state[tensor]:
                zeros = {key: torch.zeros_like(tensor) for key in MOMENTS}
                optimizer.state[tensor] = {"step": torch.zeros((), device=tensor.device)} | zeros
            if AVERAGE in self.kinds and AVERAGE not in optimizer.state[tensor]:
                optimizer.state[tensor][AVERAGE] = tensor.detach().clone()


class ModuleTrace:
    """Records which modules this rank ran in a step.

    Under ZeRO-3, ranks that run different modules mix their weights without an error.
    """

    def __init__(self, module: nn.Module) -> None:
        self.digest = 0
        self.on = False
        for name, child in module.named_modules():
            if any(True for _ in child.parameters(recurse=False)):
                key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
                child.register_forward_pre_hook(lambda _module, _inputs, key=key: self._note(key))

    def _note(self, key: int) -> None:
        if self.on:
            self.digest = (self.digest * 1_000_003 + key) % (1 << 56)

    def check(self, mesh: Mesh) -> None:
        """Raise NodeFault if ranks ran different modules or in a different order. Call it before the update."""
        digest, self.digest = self.digest, 0
        if mesh.world > 1:
            highest, lowest = mesh.maximum([digest, -digest])
            if highest != -lowest:
                raise NodeFault(
                    f"rank {mesh.rank} ran other modules than its peers in this step, so sharded weights were mixed; "
                    "every rank must call the same modules in the same order, with inputs times 0 where it has none"
                )


def _gather(parameters: list[Any]) -> None:
    """Gather parameters that stage 3 keeps between steps in one collective; DeepSpeed uses one for each."""
    if parameters:
        parameters[0].all_gather_coalesced(parameters).wait()


def _take_resident(optimizer: Any) -> list[Any]:
    """Return the parameters that stage 3 keeps gathered between steps, and stop DeepSpeed from gathering them."""
    resident, optimizer.persistent_parameters = list(optimizer.persistent_parameters), []
    return resident


def refuse_scalars(module: nn.Module) -> None:
    """Raise ConfigError for a 0-dim parameter, which DeepSpeed cannot initialise at any stage."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(f"parameter {name} has shape (); DeepSpeed needs at least one dimension, use (1,)")


def warn_of_emulation(config: RunConfig, mesh: Mesh) -> None:
    """Warn when bf16 will be slow. The precision is not changed: results must not depend on the machine."""
    slow = mesh.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if config.train.precision == "bf16" and slow and mesh.rank == 0:
        print(
            "train.precision=bf16: this CPU emulates bf16, about forty times slower than "
            "float32; use train.precision=fp32 here",
            file=sys.stderr,
            flush=True,
        )


def deepspeed_settings(
    config: RunConfig, module: nn.Module, world: int, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """Return DeepSpeed's JSON configuration for this run and module."""
    size = sum(parameter.numel() for parameter in module.parameters())
    return settings_of(config, size, world, micro_batch, accumulation, overlap=torch.cuda.is_available())


def _quiet_deepspeed() -> Any:
    deepspeed = _slim_deepspeed()
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed still calls collectives by names that torch 2.13 has deprecated, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Without it, stage 3 on a CPU starts a `numactl` process in every step to count devices.
    os.environ.setdefault("LOCAL_SIZE", "1")
    # Its shared-memory collectives take over a minute to compile at the first start; gloo's are good enough here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False)
    return deepspeed


def _slim_deepspeed() -> Any:
    """Import DeepSpeed without dependencies that are not used here: they take a third of every process's start."""
    absent = "mlflow" not in sys.modules
    if absent:  # only its autotuner needs it
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    import deepspeed
    from deepspeed.runtime import compiler

    if absent:
        del sys.modules["mlflow"]
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:  # imported to test for Muon, whose functions are decorated with torch.compile, an expensive import
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_
    return deepspeed
