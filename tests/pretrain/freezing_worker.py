"""One rank of test_freezing.py: FOLDER play | FOLDER go-on. Runs of every family, part of whose weights stand still.

Their rates decay by layer, they drop paths, and an average of the weights is kept. Each is played to the end by one
engine after the other, gone on with from checkpoints around the unfreezing step, and played by torch alone.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.catalog import Retention, committed
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.saver import Checkpoints
from pretrain.config import RunConfig
from pretrain.engine.engine import Engine
from pretrain.engine.optim import freeze, parameter_groups, unfreezing_steps
from pretrain.engine.schedule import ema_rate
from pretrain.models.noise import noise_of
from pretrain.runtime.mesh import Mesh
from pretrain.tasks.collectives import Collectives
from tests.families import PAIRS, batch_of, task_of

STEPS, UNTIL, BATCH, LR = 5, 3, 6, 1e-3
EMA = 0.3  # reached in step 3
STAGES = (3, 2, 1, 0)
FREEZE: list[Any] = [r"norm.*bias$", {"pattern": r"weight$", "until_step": UNTIL}]


def config_of(name: str, stage: int, precision: str = "fp32", **train: Any) -> RunConfig:
    """A run of the family in which norms' biases never train, and matrices and gains only from step UNTIL on."""
    family = PAIRS[name]
    decay = 1.0 if name == "vqgan" else 0.5
    task = {"discriminator_start_step": UNTIL} if "discriminator_start_step" in family.task else {}
    train |= {"zero_stage": stage, "precision": precision, "steps": STEPS, "global_batch": BATCH}
    tree = family.config(family.dropping(0.3), task, **train)
    changes = {"freeze": FREEZE, "eps": 1e-4, "layer_decay": decay, "ema": EMA}
    optim = tree.optim.model_validate(tree.optim.model_dump() | changes)
    return tree.model_copy(update={"optim": optim})


def cases() -> list[tuple[str, int, str]]:
    """Every family at one stage in fp32, all stages in turn; one family in bf16."""
    stages = itertools.cycle(STAGES)
    found = [(name, family.train.get("zero_stage", next(stages)), "fp32") for name, family in PAIRS.items()]
    return [*found, ("bert", 3, "bf16")]


class Player:
    """An engine that trains this rank's part of each batch."""

    def __init__(self, config: RunConfig, mesh: Mesh, saved: Any = None) -> None:
        self.config, self.mesh = config, mesh
        self.task = self.new_task()
        self.engine = Engine(self.task, config, mesh, BATCH // mesh.world, 1, saved.step if saved else 0)
        if saved:
            restore(saved, self.engine)

    def new_task(self) -> Any:
        return task_of(self.config, Collectives(self.mesh.gather, self.mesh.sum, self.mesh.world))

    def step(self, number: int) -> float:
        """-> the sum of the turns' losses."""
        if number > self.engine.step and number in unfreezing_steps(self.config.optim):
            self.task = self.new_task()
            self.engine = self.engine.rebuilt(self.task, number)
        mine, total = BATCH // self.mesh.world, 0.0
        for role in self.task.turns(number):
            self.engine.take_turn(role)
            batch = batch_of(self.config, mine, number * BATCH + self.mesh.rank * mine, full=True)
            turn = {"step": torch.tensor(number), "turn": torch.tensor(self.task.roles.index(role))}
            loss = self.engine.forward(batch | turn)["loss"]
            self.engine.backward(loss)
            self.engine.update(LR)
            total += float(loss.detach())
        self.engine.settle(True)
        self.task.after_step(number + 1)
        self.engine.average(ema_rate(number, EMA))
        return self.mesh.mean([total])[0]

    def kept(self) -> list[Any]:
        """All that this rank keeps, bit for bit."""
        owned = [[o.name, o.lo, o.hi, k, t.tolist()] for o in self.engine.owned() for k, t in o.tensors.items()]
        buffers = {name: buffer.tolist() for name, buffer in self.engine.deepspeed.module.named_buffers()}
        return [owned, buffers, self.engine.scalars()]

    def averages(self) -> dict[str, torch.Tensor]:
        """The average of every parameter [numel], put together from all ranks; of a frozen one, the parameter."""
        here = {owned.name: owned for owned in self.engine.owned()}
        found = {}
        for name, parameter in task_of(self.config).named_parameters():
            whole, mine = torch.zeros(parameter.numel()), here.get(name)
            if mine and not (mine.replicated and self.mesh.rank):
                whole[mine.lo : mine.hi] = mine.tensors.get("ema", mine.tensors["param"])
            found[name] = self.mesh.sum(whole)
        return found


def alone(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and averages by torch alone, on one device: an AdamW of each group from the step that first trains it."""
    task = task_of(config)
    optimizers: dict[str, Any] = {}
    losses, averages = [], dict[str, torch.Tensor]()
    for number in range(STEPS):
        for parameter in task.parameters():
            parameter.requires_grad_(True)
        freeze(task, config.optim, number)
        for group in parameter_groups(task, config.optim, number):
            optimizers.setdefault(group["name"], torch.optim.AdamW(**_adamw(group)))
        averages |= {n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad and n not in averages}
        total = 0.0
        for role in task.turns(number):
            batch = batch_of(config, BATCH, number * BATCH, full=True)
            turn = {"step": torch.tensor(number), "turn": torch.tensor(task.roles.index(role))}
            task.zero_grad(set_to_none=True)
            low = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
            with low, noise_of(batch.get("noise"), batch.get("places")):
                loss = task(batch | turn)["loss"]
            loss.backward()
            total += float(loss.detach())
            groups = [group for group in parameter_groups(task, config.optim, number) if group["role"] == role]
            learning = [parameter for group in groups for parameter in group["params"]]
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.nn.utils.clip_grad_norm_(learning, config.train.clip_norm)
            for group in groups:
                optimizers[group["name"]].step()
        task.after_step(number + 1)
        rate = min(EMA, (1 + number) / (10 + number))
        for name, parameter in task.named_parameters():
            if name in averages:
                averages[name] = rate * averages[name] + (1 - rate) * parameter.detach()
        losses.append(total)
    weights = {name: parameter.detach() for name, parameter in task.named_parameters()}
    return losses, {name: averages.get(name, weight).view(-1) for name, weight in weights.items()}


def far(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights."""
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def _adamw(group: dict[str, Any]) -> dict[str, Any]:
    return {k: group[k] for k in ("params", "betas", "eps", "weight_decay")} | {"lr": LR * group["lr_scale"]}


def played(mesh: Mesh, folder: Path, case: tuple[str, int, str]) -> dict[str, Any]:
    """Play through and save around UNTIL; then go on from each checkpoint: is everything the same in the end?"""
    config = config_of(*case)
    checkpoints = Checkpoints(folder / "-".join(map(str, case)), mesh, 0, Retention(9))
    player, losses, kinds = Player(config, mesh), [], []
    for number in range(STEPS):
        if number in (UNTIL - 1, UNTIL, UNTIL + 1):
            checkpoints.save(player.engine, number, {"optimizer": player.engine.scalars()})
            checkpoints.finish()
        losses.append(player.step(number))
        kinds.append(sum(t.numel() for o in player.engine.owned() for k, t in o.tensors.items() if k != "param"))
    expected = player.kept()
    same = {}
    for saved in committed(checkpoints.root):
        again = Player(config, mesh, saved)
        for number in range(saved.step, STEPS):
            again.step(number)
        same[saved.step] = again.kept() == expected
    updates = {name: group["updates"] for name, group in player.engine.scalars()["groups"].items()}
    expected_losses, expected_averages = alone(config)
    averages = player.averages()
    if mesh.rank == 0:
        torch.save(averages, folder / f"{'-'.join(map(str, case))}.pt")
    result = {"alone": expected_losses, "far": far(averages, expected_averages), "begun": begun(mesh, folder, case)}
    return result | {"losses": losses, "same": same, "moments": kinds, "updates": updates}


def begun(mesh: Mesh, folder: Path, case: tuple[str, int, str]) -> bool:
    """Restore a checkpoint without averages: does each begin at its weights, and are the others as they were saved?"""
    config = config_of(*case)
    without = config.model_copy(update={"optim": config.optim.model_copy(update={"ema": 0.0})})
    player, checkpoints = (
        Player(without, mesh),
        Checkpoints(folder / f"{'-'.join(map(str, case))}-without", mesh, 0, Retention(1)),
    )
    player.step(0)
    checkpoints.save(player.engine, 1, {"optimizer": player.engine.scalars()})
    checkpoints.finish()
    (saved,) = (one for one in committed(checkpoints.root) if one.step == 1)
    owned = Player(config, mesh, saved).engine.owned()
    trained = [one for one in owned if "exp_avg" in one.tensors]
    return bool(trained) and all(torch.equal(one.tensors["ema"], one.tensors["param"]) for one in trained)


def gone_on(mesh: Mesh, folder: Path, case: tuple[str, int, str]) -> dict[str, Any]:
    """The rest by another number of ranks, from each checkpoint."""
    config, found = config_of(*case), {}
    for saved in committed(folder / "-".join(map(str, case))):
        player = Player(config, mesh, saved)
        found[saved.step] = [player.step(number) for number in range(saved.step, STEPS)]
    return {"losses": found, "far": far(player.averages(), torch.load(folder / f"{'-'.join(map(str, case))}.pt"))}


def main() -> None:
    """FOLDER play | FOLDER go-on"""
    torch.set_num_threads(1)
    folder, what = Path(sys.argv[1]), sys.argv[2]
    mesh = Mesh.start(120)
    play = played if what == "play" else gone_on
    result = {"/".join(map(str, case)): play(mesh, folder, case) for case in cases()}
    mesh.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
