"""The plan of a recipe on a cluster, and the advice: the fastest setting whose memory is enough, error included."""

import dataclasses
from typing import Any

from data_pipeline.errors import ConfigError
from launchers.plan.clusters import Cluster
from launchers.plan.memory import Memory, memory_of
from launchers.plan.models import trace, trace_contrast
from launchers.plan.pace import Pace, Work, paces, sent_by_node
from launchers.plan.tape import Tape
from launchers.plan.textbook import states_bytes
from launchers.plan.traffic import Transfer, transfers_of
from pretrain.config import RunConfig, micro_batch_of
from pretrain.sharding import settings_of

DAY_S = 86_400


@dataclasses.dataclass(frozen=True)
class Plan:
    """One setting of a run on a cluster; `paces`: at low, usual and high shares of the makers' figures."""

    config: RunConfig
    cluster: Cluster
    micro: int
    accumulation: int
    tapes: tuple[Tape, Tape | None]
    memory: Memory
    transfers: tuple[Transfer, ...]
    paces: tuple[Pace, Pace, Pace]

    @property
    def tape(self) -> Tape:
        """Of a micro-batch."""
        return self.tapes[0]

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.tape.weights)

    @property
    def sample_flops(self) -> float:
        """Forward and backward of one sample; what is computed twice counts once, logits of the global batch do not."""
        return (self.tape.forward_flops + self.tape.backward_flops) / self.micro

    @property
    def step_flops(self) -> float:
        """Of all ranks, without what is computed twice."""
        return self.sample_flops * self.config.train.global_batch

    @property
    def margin(self) -> float:
        """Bytes left when the memory's error is taken in; below 0 it may not be enough."""
        return self.cluster.memory - self.memory.used - self.memory.error

    @property
    def mfu(self) -> tuple[float, float, float]:
        """Shares of the peak by `step_flops`, at the three paces."""
        peak = self.cluster.world * self.cluster.device.peaks[self.config.train.precision]
        low, usual, high = (self.step_flops / (pace.step * peak) for pace in self.paces)
        return low, usual, high

    @property
    def days(self) -> tuple[float, float, float]:
        """To the end of the run, at the three paces."""
        low, usual, high = (self.config.train.steps * pace.step / DAY_S for pace in self.paces)
        return low, usual, high

    @property
    def sent_per_rank(self) -> float:
        return sum(transfer.sent(self.cluster.world) for transfer in self.transfers)

    @property
    def sent_per_node(self) -> float:
        return sent_by_node(list(self.transfers), self.cluster)


def make_plan(config: RunConfig, cluster: Cluster, tapes: "Tapes | None" = None) -> Plan:
    """Raises ConfigError when the batch does not divide, or there are more processes than samples."""
    micro, accumulation = check_batch(config, cluster.world)
    tape, loss = tapes or trace_all(config, micro, cluster.device.on_gpu)
    size = sum(weight.numel for weight in tape.weights)
    settings = settings_of(config, size, cluster.world, micro, accumulation, overlap=cluster.device.on_gpu)
    recompute = config.train.recompute
    memory = memory_of(tape, loss, settings, cluster.world, accumulation, recompute)
    transfers = transfers_of(config, tape, settings, accumulation)
    again = sum(block.flops for block in tape.blocks) / tape.forward_flops if recompute else 0
    cached = loss is not None and accumulation > 1
    own = size / cluster.world if config.train.zero_stage else float(size)
    work = Work.of(tape, accumulation, 1 + cached + again, own)
    work += Work.of(loss, 1, 1) if loss is not None else Work(0, 0, 0)
    pace = paces(work, transfers, cluster, config.train.precision)
    return Plan(config, cluster, micro, accumulation, (tape, loss), memory, tuple(transfers), pace)


Tapes = tuple[Tape, Tape | None]


def trace_all(config: RunConfig, micro: int, on_gpu: bool) -> Tapes:
    """-> the micro-batch, and the loss where it is the global batch's."""
    loss = trace_contrast(config, on_gpu) if config.model.kind == "clip" else None
    return trace(config, micro, on_gpu), loss


def check_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """-> micro-batch and accumulation."""
    if world > config.train.global_batch:
        raise ConfigError(
            f"{world} processes are more than train.global_batch={config.train.global_batch} has samples; use at most "
            f"{config.train.global_batch}, or a global batch that is a multiple of {world}"
        )
    try:
        return micro_batch_of(config.train, world)
    except ValueError as error:
        raise ConfigError(str(error)) from None


# ------------------------------------------------------------------------------------------- advice


def advise(config: RunConfig, cluster: Cluster) -> Plan | None:
    """The fastest setting with a margin, without computing again where that is possible; None where none has one.

    Of settings that are equally fast within 1 % the recipe's own is taken, else the lower stage and larger micro-batch.
    """
    for recompute in (False, True):
        plans = [plan for plan in candidates(config, cluster, recompute) if plan.margin > 0]
        if plans:
            fastest = min(plan.paces[1].step for plan in plans)
            near = [plan for plan in plans if plan.paces[1].step <= 1.01 * fastest]
            asked = (config.train.zero_stage, check_batch(config, cluster.world)[0])
            return min(near, key=lambda plan: (_choice(plan) != asked, plan.config.train.zero_stage, -plan.micro))
    return None


def _choice(plan: Plan) -> tuple[int, int]:
    return plan.config.train.zero_stage, plan.micro


def candidates(config: RunConfig, cluster: Cluster, recompute: bool) -> list[Plan]:
    """Every stage that the model trains under, with every micro-batch that divides a rank's part of the batch."""
    per_rank = config.train.global_batch // cluster.world
    stages = [0] if config.model.kind == "vqgan" else [0, 1, 2, 3]
    found = []
    for micro in (size for size in range(1, per_rank + 1) if per_rank % size == 0):
        tapes = None
        for stage in stages:
            train = config.train.model_copy(update={"micro_batch": micro, "zero_stage": stage, "recompute": recompute})
            plan = make_plan(config.model_copy(update={"train": train}), cluster, tapes)
            tapes = plan.tapes
            found.append(plan)
    return found


def first_limit(plan: Plan, best: Plan | None) -> str:
    """What stops first: memory, the batch, or what the step waits for."""
    if plan.margin < 0:
        return (
            "memory: see the advice" if best else "memory, at every stage and micro-batch: take more or larger devices"
        )
    if plan.micro * plan.accumulation == 1 and plan.cluster.world > 1:
        return "the batch: a sample a device; more devices need a larger train.global_batch"
    names = {"products": "arithmetic", "memory": "the rate of memory", "network": "the network"}
    return f"{names[plan.paces[1].bound_by]}: the largest part of the step"


# ------------------------------------------------------------------------------------------- as plain data


def as_json(plan: Plan, best: Plan | None) -> dict[str, Any]:
    """Everything, with units in the names."""
    train, device = plan.config.train, plan.cluster.device
    tokens = tokens_of(plan.config)
    usual = plan.paces[1]
    return {
        "run": plan.config.run,
        "model": plan.config.model.kind,
        "parameters": plan.parameters,
        "cluster": {"device": device.name, "nodes": plan.cluster.nodes, "per_node": plan.cluster.per_node}
        | {"peak_flops": device.peaks[train.precision], "network_bytes_per_s": plan.cluster.network},
        "setting": setting(plan) | {"precision": train.precision, "global_batch": train.global_batch},
        "textbook_states_bytes": states_bytes(plan.parameters, plan.cluster.world, train.zero_stage),
        "memory_bytes": {item.what: round(item.bytes) for item in plan.memory.items}
        | {"used": round(plan.memory.used), "error": round(plan.memory.error)}
        | {"available": round(plan.cluster.memory), "margin": round(plan.margin)},
        "flops": {"forward_per_sample": plan.tape.forward_flops / plan.micro, "per_sample": plan.sample_flops}
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


def setting(plan: Plan) -> dict[str, Any]:
    """What the advice chooses."""
    return {
        "zero_stage": plan.config.train.zero_stage,
        "micro_batch": plan.micro,
        "accumulation": plan.accumulation,
        "recompute": plan.config.train.recompute,
    }


def tokens_of(config: RunConfig) -> int:
    """Of a sample, where a sample is tokens; else 0."""
    model = config.model
    if model.kind in ("bert", "electra"):
        return model.context
    return model.text_tokens + model.image_tokens - 1 if model.kind == "gpt" else 0
