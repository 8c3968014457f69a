"""One rank of test_sharded: trains a model under ZeRO-3 and on rank 0 prints its losses as JSON.

Started as `python zero3_worker.py KIND` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import json
import os
import sys
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
STEPS, BATCH = 4, 4


def build(kind: str) -> torch.nn.Module:
    """The same tiny model of `kind` in every process."""
    from pretrain import schema as C
    from pretrain.models import MODELS
    from pretrain.schema.clip import TextTower, VisionTower

    tower = {"vocab_size": 60, "context": 8, "layers": 2, "width": 16, "heads": 2, "dropout": 0.0}
    configs: dict[str, Any] = {
        "bert": C.BertConfig(**tower, embedding_width=16),
        "electra": C.ElectraConfig(**tower, embedding_width=12, generator_fraction=0.5),
        "clip": C.ClipConfig(
            vision=VisionTower(image_size=8, patch_size=4, width=16, layers=2, heads=2),
            text=TextTower(vocab_size=60, context=8, width=16, layers=2, heads=2),
            embed_dim=8,
        ),
    }
    torch.manual_seed(0)
    return MODELS[kind](configs[kind])


def batch(kind: str, step: int) -> dict[str, torch.Tensor]:
    """BATCH rows, every one with two masked words."""
    g = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(5, 60, (BATCH, 8), generator=g)
    if kind == "clip":
        eot = torch.randint(2, 8, (BATCH,), generator=g)
        return {"pixels": torch.randn(BATCH, 3, 8, 8, generator=g), "tokens": tokens, "eot": eot}
    rows = {"tokens": tokens, "types": (torch.arange(8) > 3).long().expand(BATCH, 8).clone()}
    rows |= {"attention": (torch.arange(8) < 7).expand(BATCH, 8).clone()}
    rows |= {"positions": torch.tensor([[1, 5]] * BATCH), "label_weights": torch.ones(BATCH, 2)}
    rows |= {"labels": torch.randint(5, 60, (BATCH, 2), generator=g)}
    rows |= {"uniforms": torch.rand(BATCH, 2, generator=g), "is_random": torch.arange(BATCH) % 2}
    return rows


class Mean(torch.nn.Module):
    """A loss that averages over rows, so that the mean over ranks is the loss of the whole batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from pretrain import schema as C
        from pretrain.tasks import TASKS
        from pretrain.tasks.collectives import ONE_DEVICE

        self.kind = kind
        configs: dict[str, Any] = {"bert": C.MlmNspConfig(), "electra": C.RtdConfig()}
        model = build(kind)
        self.inner = TASKS[configs[kind].kind](model, configs[kind], ONE_DEVICE) if kind in configs else model

    def forward(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.kind != "clip":
            return self.inner(rows)["loss"]
        image, text, scale = self.inner(rows["pixels"], rows["tokens"], rows["eot"])
        return (scale * (1 - (image * text).sum(-1))).mean()


def optimizer_of(module: torch.nn.Module) -> torch.optim.Optimizer:
    # the large eps keeps rounding in near-zero gradients (key biases) from being blown up to whole steps
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1, fused=True)


def main(kind: str) -> None:
    """Train under ZeRO-3; every parameter is sharded and gathered anew for each use."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    module = Mean(kind)
    settings = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_clipping": 0.0,  # left out, DeepSpeed clips to 1
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer_of(module), config=settings)
    losses = []
    for step in range(STEPS):
        size = BATCH // world
        loss = engine({key: rows[rank * size : (rank + 1) * size] for key, rows in batch(kind, step).items()})
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / world)
    if rank == 0:
        print("LOSSES", json.dumps(losses), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
