"""DeepSpeed set-up and step: ZeRO stages 0 to 3 behind the same few calls, on CPU and CUDA.

What DeepSpeed 0.19 gets wrong is put right here, each with a test in tests/pretrain/engine/test_engine.py: gradients
left over from the step before (stage 3), ranks that run different modules (silently mixed weights), 0-dim parameters
(broken initialisation), bf16 at stage 0 (another, less accurate path: autocast at every stage instead), and operators
compiled for minutes on first use.

Where a task takes turns, all its optimizers are groups of one AdamW, and a step of DeepSpeed is one of one role:
the others' parameters ask for no gradient meanwhile, so theirs are zero in norm and clipping, and their groups are
hidden from AdamW, which would decay weights and move moments even so.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError, NodeFault
from pretrain.config import RunConfig
from pretrain.engine.optim import build_optimizer, parameter_groups
from pretrain.engine.sharding import settings_of
from pretrain.models.noise import noise_of
from pretrain.runtime.mesh import Mesh
from pretrain.schema.common import MAIN

if TYPE_CHECKING:
    from pretrain.tasks.task import Task

MOMENTS = ("exp_avg", "exp_avg_sq")
HYPER_PARAMETERS = ("weight_decay", "betas", "eps")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclasses.dataclass(frozen=True)
class Owned:
    """The part [lo, hi) of one flattened parameter that this rank keeps: writable float32 views [hi - lo].

    replicated: every rank keeps the same, whole. A frozen parameter has no moments.
    """

    name: str
    shape: tuple[int, ...]
    lo: int
    hi: int
    tensors: dict[str, Tensor]
    replicated: bool = False


class Engine:
    """A task under DeepSpeed.

    Calls of a step: for each of its turns take_turn, forward and backward (per micro-batch), update; then settle.
    """

    def __init__(self, task: "Task", config: RunConfig, mesh: Mesh, micro_batch: int, accumulation: int) -> None:
        refuse_scalars(task)
        self.mesh = mesh
        self.stage = config.train.zero_stage
        self.role = MAIN
        self._replaced: list[tuple[Tensor, Tensor]] = []
        self._norm: float | None = None
        self._accepts: Callable[[float], bool] = math.isfinite
        self._verdict: bool | None = None
        # Any: DeepSpeed hangs ds_tensor, ds_shape and _hp_mapping on nn.Parameter.
        self.names: dict[Any, str] = {parameter: name for name, parameter in task.named_parameters()}
        self.trace = ModuleTrace(task)
        deepspeed = _quiet_deepspeed()
        groups = self.groups = parameter_groups(task, config.optim)
        self.roles = task.roles
        settings = deepspeed_settings(config, task, mesh.world, micro_batch, accumulation)
        warn_of_emulation(config, mesh)
        task.to(mesh.device)
        self.deepspeed, *_ = deepspeed.initialize(
            model=task, optimizer=build_optimizer(groups), config=settings, dist_init_required=False
        )
        self.resident = _take_resident(self.deepspeed.optimizer) if self.stage == 3 else []
        self._guard_optimizer()

    def take_turn(self, role: str, keep: bool = False) -> None:
        """From here to the next `update` only the parameters of `role` learn. keep: `settle` can take that back."""
        self.role = role
        if keep:
            self._replaced += [(tensor, tensor.clone()) for tensor in self._state_of(role)]
        self._learn((role,))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One micro-batch on this rank -> named losses; "loss" is the one to differentiate."""
        self.trace.on = True  # what one rank runs beside the step, such as a preview, is not part of it
        try:
            there = {name: tensor.to(self.mesh.device) for name, tensor in batch.items()}
            with noise_of(there.get("noise"), there.get("places")):
                return self.deepspeed(there)
        finally:
            self.trace.on = False

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the mean over micro-batches."""
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def update(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        """Clip, AdamW at rate `lr`, clear -> the global norm, before clipping, of the gradient of this turn's role.

        `accepts(norm)` says whether the gradient is applied; where it is not, it is only cleared.
        """
        self._accepts, self._verdict = accepts, None
        self.trace.check(self.mesh)
        # At stage 0 DeepSpeed clips without telling the norm.
        grads = [parameter.grad for parameter in self.names if parameter.grad is not None] if self.stage == 0 else []
        self._norm = float(torch.nn.utils.get_total_norm(grads)) if self.stage == 0 else None
        for group in self._base_optimizer().param_groups:
            if group["role"] == self.role:
                group["lr"] = lr
        self.deepspeed.step()
        if self.stage == 3:
            # DeepSpeed never clears these partitions: a parameter without a gradient in the next first micro-step
            # would be updated by this step's once more.
            self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
            self._gather_resident()
        self._learn(self.roles)
        self._accepted()  # DeepSpeed does not come to the optimizer where it sees an overflow itself
        return self._global_norm()

    @torch.no_grad()
    def settle(self, accepted: bool) -> None:
        """The step's last word: where it is refused, what its turns have changed becomes what it was before."""
        if self._replaced and not accepted:
            for tensor, before in self._replaced:
                tensor.copy_(before)
            self.refresh()
        self._replaced.clear()

    def _learn(self, roles: tuple[str, ...]) -> None:
        """Which parameters ask for a gradient: between turns all but the frozen ones."""
        if len(self.roles) > 1:
            for group in self.groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(group["role"] in roles)

    def _state_of(self, role: str) -> Iterator[Tensor]:
        """All that an update of this role changes on this rank: masters, moments, counts."""
        names = {name for group in self.groups if group["role"] == role for name in group["names"]}
        for owned in self.owned():
            if owned.name in names:
                yield from owned.tensors.values()
        for number, tensor in self._optimized():
            if self.groups[number]["role"] == role:
                yield self._base_optimizer().state[tensor]["step"]

    def _gather_resident(self) -> None:
        """One collective for all parameters that stage 3 keeps gathered between steps; DeepSpeed takes one for each."""
        if self.resident:
            self.resident[0].all_gather_coalesced(self.resident).wait()

    def _global_norm(self) -> float:
        return float(self.deepspeed.optimizer._global_grad_norm or 0.0) if self._norm is None else self._norm

    def _accepted(self) -> bool:
        """Asked once an update: DeepSpeed steps the optimizer for each of its groups, or not at all."""
        if self._verdict is None:
            self._verdict = self._accepts(self._global_norm())
        return self._verdict

    def _guard_optimizer(self) -> None:
        """DeepSpeed knows the norm only inside its step: the optimizer below it asks before it touches anything.

        It also sees the groups of this turn's role alone.
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

    # --------------------------------------------------------------------------------- state, by intervals

    def owned(self) -> list[Owned]:
        """What this rank keeps, as views that may be written. Stage 0 keeps every parameter whole on every rank."""
        self._make_moments()
        return [owned for parameter, name in self.names.items() for owned in self._owned_of(name, parameter)]

    def scalars(self) -> dict[str, Any]:
        """What the optimizer keeps beside tensors, as plain JSON: counts of updates, groups by name, loss scale.

        Every group has its own count, which AdamW's bias correction reads: optimizers that step apart stay apart.
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
        """Go on from `scalars()`. Raises DataError where a group has other members or settings than it was saved with.

        Tensors are to be restored first: the state that holds the counts must exist.
        """
        now = self.scalars()["groups"]
        for name in sorted(saved["groups"].keys() | now.keys()):
            before, after = saved["groups"].get(name, {}), now.get(name, {})
            wrong = [key for key in ("names", *HYPER_PARAMETERS) if before.get(key) != after.get(key)]
            if wrong:
                raise DataError(
                    f"{where}: parameter group {name} differs in {', '.join(wrong)}; go on with the revision and the "
                    "settings that saved it, or start another run from its weights with `initial`"
                )
        counts = [saved["groups"][group["name"]]["updates"] for group in self.groups]
        for number, tensor in self._optimized():
            self._base_optimizer().state[tensor]["step"].fill_(counts[number])
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        for key, value in saved["loss_scale"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)

    def _loss_scale(self) -> dict[str, Any]:
        """What moves in DeepSpeed's loss scaler; empty where there is none (stage 0)."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the working copies agree with the masters after `owned()` was written. All ranks call it together."""
        if self.stage == 3:
            for parameter, name in self.names.items():
                for owned in self._owned_of(name, parameter):
                    parameter.ds_tensor.data.view(-1)[: owned.hi - owned.lo].copy_(owned.tensors["param"])
            if self.resident:
                self.resident[0].partition(self.resident)
                self._gather_resident()
        elif self.stage in (1, 2):
            self.deepspeed.optimizer.update_lp_params()

    def _owned_of(self, name: str, parameter: Any) -> Iterator[Owned]:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        size = torch.Size(shape).numel()
        if self.stage == 0:
            state = self._base_optimizer().state.get(parameter, {})
            sources = {"param": parameter.data} | {key: state[key] for key in MOMENTS if key in state}
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
            sources = {"param": flat.data} | {key: state[key] for key in MOMENTS}
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
        sources |= {key: safe_get_local_optimizer_state(parameter, key) for key in MOMENTS}
        yield Owned(name, shape, lo, hi, {key: tensor.view(-1)[: hi - lo] for key, tensor in sources.items()})

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.deepspeed.optimizer if self.stage == 0 else self.deepspeed.optimizer.optimizer

    def _optimized(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the group, tensor that the base optimizer steps): parameters, or flat parts of them."""
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
        """AdamW makes its state at the first step; what is loaded before needs it now."""
        optimizer = self._base_optimizer()
        for _, tensor in self._optimized():
            if not optimizer.state[tensor]:
                zeros = {key: torch.zeros_like(tensor) for key in MOMENTS}
                optimizer.state[tensor] = {"step": torch.zeros((), device=tensor.device)} | zeros


class ModuleTrace:
    """Which modules this rank ran in a step.

    Under ZeRO-3 ranks that differ mix each other's weights without an error.
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
        """Raises NodeFault before anything is updated when the ranks ran other modules or another order."""
        digest, self.digest = self.digest, 0
        if mesh.world > 1:
            highest, lowest = mesh.maximum([digest, -digest])
            if highest != -lowest:
                raise NodeFault(
                    f"rank {mesh.rank} ran other modules than its peers in this step, so sharded weights were mixed; "
                    "every rank must call the same modules in the same order, with inputs times 0 where it has none"
                )


def _take_resident(optimizer: Any) -> list[Any]:
    """The parameters that stage 3 keeps gathered between steps, out of the hands of DeepSpeed's own step."""
    resident, optimizer.persistent_parameters = list(optimizer.persistent_parameters), []
    return resident


def refuse_scalars(module: nn.Module) -> None:
    """Raises ConfigError for a 0-dim parameter, which DeepSpeed cannot initialise at any stage."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(f"parameter {name} has shape (); DeepSpeed needs at least one dimension, make it (1,)")


def warn_of_emulation(config: RunConfig, mesh: Mesh) -> None:
    """Say it when bf16 will be slow; it is not changed, as the result must not depend on the machine."""
    slow = mesh.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if config.train.precision == "bf16" and slow and mesh.rank == 0:
        print(
            "train.precision=bf16: this processor has no such arithmetic and emulates it, some forty times slower than "
            "float32; take train.precision=fp32 here",
            file=sys.stderr,
            flush=True,
        )


def deepspeed_settings(
    config: RunConfig, module: nn.Module, world: int, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """DeepSpeed's JSON for this run and this module."""
    size = sum(parameter.numel() for parameter in module.parameters())
    return settings_of(config, size, world, micro_batch, accumulation, overlap=torch.cuda.is_available())


def _quiet_deepspeed() -> Any:
    deepspeed = _slim_deepspeed()
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed still calls collectives by names that torch 2.13 wants spelt otherwise, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Without it stage 3 on a CPU starts `numactl` as a process of its own in every step, to count devices.
    os.environ.setdefault("LOCAL_SIZE", "1")
    # Its shared-memory collectives are compiled for over a minute at the first start; gloo's own do as well here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False)
    return deepspeed


def _slim_deepspeed() -> Any:
    """DeepSpeed without what it imports for uses that are not made here: a third of the start of every process."""
    absent = "mlflow" not in sys.modules
    if absent:  # for its autotuner
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    import deepspeed
    from deepspeed.runtime import compiler

    if absent:
        del sys.modules["mlflow"]
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:  # it asks whether the optimizer is Muon, whose functions are decorated with torch's whole compiler
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_
    return deepspeed
