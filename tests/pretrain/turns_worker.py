"""One rank of test_turns.py: two optimizers in turns, by the engine at every stage and by torch alone."""

import dataclasses
import json
import math
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.checkpoint.catalog import Retention, committed
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.saver import Checkpoints
from pretrain.config import AdamWConfig, OptimConfig
from pretrain.engine.engine import Engine
from pretrain.engine.optim import parameter_groups
from pretrain.runtime.mesh import Mesh
from tests.pretrain.engine_worker import BATCH, STEPS, WIDTH, config, global_batch
from tests.pretrain.plain import Plain

STAGES = (0, 1, 2, 3)
HALF = 3
STARTS = 2
"""The step from which on the judge learns."""
CLIP = 0.5
OPTIM = OptimConfig(
    lr=1e-2, eps=1e-4, weight_decay=0.1, roles={"judge": {"lr": 3e-2, "betas": (0.5, 0.9), "weight_decay": 0.3}}
)


class Game(Plain):
    """As ELECTRA in two steps: a maker fills in, then a judge tells what it filled in from what was there.

    The maker also learns to please the judge, through weights of the judge that stand still, and the judge reads the
    maker's table and a difference of its own (DeBERTa's gradient-disentangled sharing).
    """

    roles: ClassVar[tuple[str, ...]] = ("main", "judge")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.maker = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.judge = nn.ModuleDict({"difference": nn.Linear(WIDTH, WIDTH, bias=False), "head": nn.Linear(WIDTH, 1)})

    def role_of(self, name: str) -> str:
        return "judge" if name.startswith("judge.") else "main"

    def turns(self, step: int) -> tuple[str, ...]:
        return self.roles if step >= STARTS else self.roles[:1]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """x float32 [b, WIDTH], turn int64 [] -> loss."""
        x = batch["x"]
        if int(batch["turn"]):
            with torch.no_grad():
                made = self.made(x)
                of_made, of_x = self.table(made), self.table(x)
            guilty, innocent = self.verdict(made, of_made), self.verdict(x, of_x)
            return {"loss": F.softplus(-guilty).mean() + F.softplus(innocent).mean()}
        made = self.made(x)
        return {"loss": (made - x).square().mean() - 0.3 * self.verdict(made, self.table(made)).mean()}

    def made(self, x: Tensor) -> Tensor:
        return self.maker(torch.tanh(self.frozen(self.table(x))))

    def verdict(self, x: Tensor, shared: Tensor) -> Tensor:
        return self.judge["head"](torch.tanh(shared + self.judge["difference"](x)))


def plain() -> dict[str, Any]:
    """By torch alone on one device: two AdamW, each of its own parameters, one after the other."""
    game = Game()
    optimizers, members = {}, {}
    for role in game.roles:
        own: AdamWConfig = OPTIM.of(role)
        members[role] = [p for n, p in game.named_parameters() if game.role_of(n) == role and p.requires_grad]
        groups = [
            {"params": [p for p in members[role] if p.ndim == 2], "weight_decay": own.weight_decay},
            {"params": [p for p in members[role] if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizers[role] = torch.optim.AdamW(groups, lr=own.lr, betas=own.betas, eps=own.eps)
    losses, norms = [], []
    for step in range(STEPS):
        for number, role in enumerate(game.turns(step)):
            game.zero_grad()
            loss = game({"x": global_batch(step), "turn": torch.tensor(number)})["loss"]
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(members[role], CLIP)))
            optimizers[role].step()
            losses.append(float(loss.detach()))
    weights = {name: parameter.detach().flatten().tolist() for name, parameter in game.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


@dataclasses.dataclass
class Player:
    """The same by the engine of one stage."""

    engine: Engine
    mesh: Mesh
    accumulation: int

    @classmethod
    def at(cls, mesh: Mesh, stage: int, accumulation: int = 1) -> "Player":
        settings = config(zero_stage=stage, clip_norm=CLIP).model_copy(update={"optim": OPTIM})
        return cls(
            Engine(Game(), settings, mesh, BATCH // mesh.world // accumulation, accumulation), mesh, accumulation
        )

    def step(self, number: int, refused: str = "") -> list[tuple[float, float]]:
        """-> (loss, norm) of each turn; from the turn of the role `refused` on nothing is applied, as the guards do."""
        engine, found = self.engine, []
        roles = Game.turns(engine.deepspeed.module, number)
        fine = True
        for turn, role in enumerate(roles):
            fine &= role != refused
            engine.take_turn(role, keep=role != roles[-1])
            values = []
            for x in global_batch(number).chunk(self.mesh.world)[self.mesh.rank].chunk(self.accumulation):
                loss = engine.forward({"x": x, "turn": torch.tensor(turn)})["loss"]
                engine.backward(loss)
                values.append(float(loss.detach()))
            norm = engine.update(OPTIM.of(role).lr, lambda norm, fine=fine: fine and math.isfinite(norm))
            found.append((self.mesh.mean([sum(values) / len(values)])[0], norm))
        engine.settle(not refused)
        return found

    def kept(self) -> list[tuple[str, str, list[float]]]:
        """All that this rank keeps."""
        parts = self.engine.owned()
        return [(part.name, kind, tensor.tolist()) for part in parts for kind, tensor in part.tensors.items()]


def played(mesh: Mesh, stage: int, accumulation: int) -> dict[str, Any]:
    """The whole game by the engine; of the weights, how far the farthest is from torch's."""
    player, expected = Player.at(mesh, stage, accumulation), plain()
    turns = [pair for number in range(STEPS) for pair in player.step(number)]
    far = 0.0
    for part in player.engine.owned():
        wanted = torch.tensor(expected["weights"][part.name][part.lo : part.hi])
        far = max(far, float((part.tensors["param"] - wanted).abs().max()))
    counts = {name: group["updates"] for name, group in player.engine.scalars()["groups"].items()}
    losses, norms = zip(*turns, strict=True)
    return {"losses": losses, "norms": norms, "far": far, "counts": counts, "plain": expected}


def refused(mesh: Mesh, stage: int) -> dict[str, bool]:
    """Steps 0, 3 and 5 with a step between the last two of which one turn is refused: is all as if it had not been?"""

    def after(role: str | None) -> Any:
        player = Player.at(mesh, stage)
        player.step(0), player.step(3)
        if role is not None:
            player.step(4, role)
        between = (player.kept(), player.engine.scalars())
        return between, player.step(5), player.kept(), player.engine.scalars()

    expected = after(None)
    return {role: after(role) == expected for role in Game.roles}


def saved_half_way(mesh: Mesh, folder: str) -> None:
    """A checkpoint after HALF steps at stage 3."""
    player, checkpoints = Player.at(mesh, 3), Checkpoints(folder, mesh, 0, Retention(1))
    for number in range(HALF):
        player.step(number)
    checkpoints.save(player.engine, HALF, {"optimizer": player.engine.scalars()})
    checkpoints.finish()


def gone_on(mesh: Mesh, folder: str, stage: int) -> dict[str, Any]:
    """The rest of the game from that checkpoint, at another stage and by whatever ranks there are."""
    player = Player.at(mesh, stage)
    restore(committed(folder)[-1], player.engine)
    turns = [pair for number in range(HALF, STEPS) for pair in player.step(number)]
    counts = {name: group["updates"] for name, group in player.engine.scalars()["groups"].items()}
    return {"losses": [loss for loss, _ in turns], "counts": counts, "plain": plain()["losses"][-len(turns) :]}


def main() -> None:
    """FOLDER play | FOLDER go-on"""
    torch.set_num_threads(1)
    folder, what = sys.argv[1:]
    mesh = Mesh.start(60)
    if what == "go-on":
        result: dict[str, Any] = {str(stage): gone_on(mesh, folder, stage) for stage in STAGES}
    else:
        result = {"groups": [group["name"] for group in parameter_groups(Game(), OPTIM)]}
        for stage in STAGES:
            result |= {f"{stage}/{accumulation}": played(mesh, stage, accumulation) for accumulation in (1, 2)}
            result[f"{stage}/refused"] = refused(mesh, stage)
        saved_half_way(mesh, folder)
    mesh.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
