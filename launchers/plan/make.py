"""Plan a recipe on a cluster, and advise: the fastest setting whose memory suffices, its error included."""

import contextlib
import dataclasses
import math
from typing import Any

from data_pipeline.errors import ConfigError
from launchers.plan.clusters import Cluster
from launchers.plan.figures import FP32, Traced
from launchers.plan.memory import Memory, memory_of
from launchers.plan.pace import UPDATE_BYTES, Pace, Work, paces, sent_by_node
from launchers.plan.textbook import states_bytes
from launchers.plan.traffic import Transfer, transfers_of
from pretrain.config import RunConfig, check_sections, micro_batch_of
from pretrain.engine.sharding import settings_of

DAY_S = 86_400


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The plan of one setting on a cluster. `paces`: at low, usual and high shares of the vendors' figures."""

    config: RunConfig
    cluster: Cluster
    micro: int
    accumulation: int
    traced: Traced
    memory: Memory
    transfers: tuple[Transfer, ...]
    paces: tuple[Pace, Pace, Pace]

    @property
    def parameters(self) -> int:
        return self.traced.parameters

    @property
    def forward_flops(self) -> float:
        """Forward FLOPs of the model per sample."""
        return self.traced.micro.forward / self.micro

    @property
    def sample_flops(self) -> float:
        """Forward and backward FLOPs per sample, without recomputation and without logits of the global batch."""
        return (self.traced.micro.forward + self.traced.micro.backward) / self.micro

    @property
    def tokens(self) -> int:
        """Tokens per sample if a sample consists of tokens alone, else 0."""
        return round(self.traced.micro.tokens / self.micro)

    @property
    def step_flops(self) -> float:
        """FLOPs of a step over all ranks, without recomputation."""
        return self.sample_flops * self.config.train.global_batch

    @property
    def margin(self) -> float:
        """Bytes left after the memory used and its error; below 0, memory may not suffice."""
        return self.cluster.memory - self.memory.used - self.memory.error

    @property
    def mfu(self) -> tuple[float, float, float]:
        """Model FLOPs utilization: `step_flops` as a share of the peak, at the three paces."""
        peak = self.cluster.world * self.cluster.device.peaks[self.config.train.precision]
        low, usual, high = (self.step_flops / (pace.step * peak) for pace in self.paces)
        return low, usual, high

    @property
    def days(self) -> tuple[float, float, float]:
        """Days to the end of the run, at the three paces; a smaller batch of `batch_warmup` counts by its samples."""
        whole_steps = self.config.train.samples / self.config.train.global_batch
        low, usual, high = (whole_steps * pace.step / DAY_S for pace in self.paces)
        return low, usual, high

    @property
    def sent_per_rank(self) -> float:
        return sum(transfer.sent(self.cluster.world) for transfer in self.transfers)

    @property
    def sent_per_node(self) -> float:
        return sent_by_node(list(self.transfers), self.cluster)


def make_plan(config: RunConfig, cluster: Cluster, traced: Traced | None = None) -> RunPlan:
    """Plan a run. Raise ConfigError if the batch does not divide or there are more processes than samples."""
    micro, accumulation = check_batch(config, cluster.world)
    traced = traced or trace_step(config, cluster)
    size = traced.parameters
    settings = settings_of(config, size, cluster.world, micro, accumulation, overlap=cluster.device.on_gpu)
    memory = memory_of(traced, settings, cluster.world, accumulation, ema=config.optim.ema > 0)
    transfers = transfers_of(traced, settings, accumulation)
    updated = traced.trained / (cluster.world if config.train.zero_stage else 1)
    updated *= 1 + (3 * FP32 / UPDATE_BYTES if config.optim.ema else 0)  # the average reads two tensors and writes one
    work = Work.of(traced, accumulation, updated)
    pace = paces(work, transfers, cluster, config.train.precision)
    return RunPlan(config, cluster, micro, accumulation, traced, memory, tuple(transfers), pace)


def trace_step(config: RunConfig, cluster: Cluster) -> Traced:
    """Trace a step of the real task on one rank. Imports torch."""
    from launchers.plan.trace import trace

    micro, accumulation = check_batch(config, cluster.world)
    return trace(config, micro, accumulation, cluster.world, cluster.device.on_gpu)


def check_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """Return (micro-batch, accumulation). Raise ConfigError if the batch does not divide among `world` ranks."""
    if world > config.train.global_batch:
        raise ConfigError(
            f"{world} processes exceed train.global_batch={config.train.global_batch}; use at most "
            f"{config.train.global_batch}, or a global batch that is a multiple of {world}"
        )
    try:
        return micro_batch_of(config.train, world)
    except ValueError as error:
        raise ConfigError(str(error)) from None


# ------------------------------------------------------------------------------------------- advice


def advise(config: RunConfig, cluster: Cluster, planned: RunPlan | None = None) -> RunPlan | None:
    """Return the fastest setting with a positive margin, without recomputation if possible; None if there is none.

    Among settings within 1 % of the fastest, prefer the recipe's own, then the lower stage, then the larger
    micro-batch. planned: the recipe's own plan, whose trace is reused.
    """
    for recompute in (False, True):
        known = planned.traced if planned and config.train.recompute == recompute else None
        plans = [plan for plan in candidates(config, cluster, recompute, known) if plan.margin > 0]
        if plans:
            fastest = min(plan.paces[1].step for plan in plans)
            near = [plan for plan in plans if plan.paces[1].step <= 1.01 * fastest]
            asked = (config.train.zero_stage, check_batch(config, cluster.world)[0])
            return min(near, key=lambda plan: (_choice(plan) != asked, plan.config.train.zero_stage, -plan.micro))
    return None


def _choice(plan: RunPlan) -> tuple[int, int]:
    return plan.config.train.zero_stage, plan.micro


def candidates(config: RunConfig, cluster: Cluster, recompute: bool, known: Traced | None = None) -> list[RunPlan]:
    """Return plans for every stage that the task supports and every micro-batch that divides a rank's batch."""
    per_rank = math.gcd(*config.train.batches) // cluster.world
    sizes = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    train = config.train.model_copy(update={"recompute": recompute})
    traces = _traces(config.model_copy(update={"train": train}), cluster, sizes, known)
    found = []
    for size, traced in zip(sizes, traces, strict=True):
        for stage in stages_of(config):
            update = {"micro_batch": size, "zero_stage": stage}
            run = config.model_copy(update={"train": train.model_copy(update=update)})
            found.append(make_plan(run, cluster, traced))
    return found


def _traces(config: RunConfig, cluster: Cluster, sizes: list[int], known: Traced | None) -> list[Traced]:
    """Return a step for each of these micro-batch sizes, ascending: the ends are traced, the others interpolated.

    If the loss is over the whole batch, the upper end of the interpolation is the largest size that splits the batch.
    """

    def traced(size: int) -> Traced:
        if known and known.rows == size:
            return known
        train = config.train.model_copy(update={"micro_batch": size})
        return trace_step(config.model_copy(update={"train": train}), cluster)

    found = {size: traced(size) for size in dict.fromkeys((sizes[-1], sizes[0]))}
    low, high = found[sizes[0]], found[sizes[-1]]
    if low.first.flops and len(sizes) > 2:
        high = found.setdefault(sizes[-2], traced(sizes[-2]))
    return [found.get(size) or low.at(size, high) for size in sizes]


def stages_of(config: RunConfig) -> list[int]:
    """Return the ZeRO stages that the run's task supports: those that the schema accepts."""
    found = []
    for stage in range(4):
        with contextlib.suppress(ValueError):
            train = config.train.model_copy(update={"zero_stage": stage})
            check_sections(config.model_copy(update={"train": train}))
            found.append(stage)
    return found


def first_limit(plan: RunPlan, best: RunPlan | None) -> str:
    """Return what limits the run first: memory, the batch, or the largest part of the step."""
    if plan.margin < 0:
        return (
            "memory: see the advice" if best else "memory, at every stage and micro-batch: use more or larger devices"
        )
    if plan.micro * plan.accumulation == 1 and plan.cluster.world > 1:
        return "the batch: one sample per device; more devices need a larger train.global_batch"
    names = {"products": "arithmetic", "memory": "memory bandwidth", "network": "the network"}
    return f"{names[plan.paces[1].bound_by]}: the largest part of the step"


# ------------------------------------------------------------------------------------------- as plain data


def as_json(plan: RunPlan, best: RunPlan | None) -> dict[str, Any]:
    """Return the whole plan as plain data, with units in the names."""
    train, device = plan.config.train, plan.cluster.device
    tokens = plan.tokens
    usual = plan.paces[1]
    return {
        "run": plan.config.run,
        "model": plan.config.model.kind,
        "parameters": plan.parameters,
        "trained_parameters": plan.traced.trained,
        "frozen_parameters": plan.parameters - plan.traced.trained,
        "cluster": {"device": device.name, "nodes": plan.cluster.nodes, "per_node": plan.cluster.per_node}
        | {"peak_flops": device.peaks[train.precision], "network_bytes_per_s": plan.cluster.network},
        "setting": setting(plan) | {"precision": train.precision, "global_batch": train.global_batch},
        "textbook_states_bytes": states_bytes(plan.parameters, plan.cluster.world, train.zero_stage),
        "memory_bytes": {item.what: round(item.bytes) for item in plan.memory.items}
        | {"used": round(plan.memory.used), "error": round(plan.memory.error)}
        | {"available": round(plan.cluster.memory), "margin": round(plan.margin)},
        "flops": {"forward_per_sample": plan.forward_flops, "per_sample": plan.sample_flops}
        | {"per_token": plan.sample_flops / tokens if tokens else None, "per_step": plan.step_flops},
        "traffic_bytes": {f"{t.what} ({t.kind})": t.bytes * t.times for t in plan.transfers}
        | {"sent_per_rank": plan.sent_per_rank, "sent_per_node": plan.sent_per_node},
        "step_s": {"usual": usual.step, "fastest": plan.paces[2].step, "slowest": plan.paces[0].step}
        | {"products": usual.products, "memory": usual.moved + usual.update, "network": usual.network}
        | {"network_exposed": usual.exposed},
        "samples_per_s": [train.global_batch / pace.step for pace in plan.paces],
        "mfu": plan.mfu,
        "days": sorted(plan.days),
        "first_limit": first_limit(plan, best),
        "advice": None if best is None else setting(best) | {"step_s": best.paces[1].step, "margin_bytes": best.margin},
    }


def setting(plan: RunPlan) -> dict[str, Any]:
    """Return the settings that the advice chooses."""
    return {
        "zero_stage": plan.config.train.zero_stage,
        "micro_batch": plan.micro,
        "accumulation": plan.accumulation,
        "recompute": plan.config.train.recompute,
    }
