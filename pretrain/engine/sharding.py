"""Generates DeepSpeed's JSON, which defines how a run is sharded. Imports no torch, as `tessera plan` uses it too."""

from typing import Any

from pretrain.config import RunConfig

RESIDENT_PARAMETERS = 50_000_000
"""Up to this many parameters, stage 3 keeps them gathered between steps; gradients and optimizer stay sharded."""
BUCKET = 50_000_000


def settings_of(
    config: RunConfig, size: int, world: int, micro_batch: int, accumulation: int, overlap: bool
) -> dict[str, Any]:
    """Return DeepSpeed's JSON for this run. Buckets scale with the model's `size`; `deepspeed.extra` is merged last."""
    bucket = min(size, BUCKET) // 64 * 64 + 64  # DeepSpeed needs whole alignment units
    zero: dict[str, Any] = {
        "stage": config.train.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": overlap,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.train.zero_stage == 3:
        resident = size <= RESIDENT_PARAMETERS
        zero["memory_efficient_linear"] = not resident  # a linear layer in Python that avoids autocast's copies
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_param_persistence_threshold"] = size if resident else 100_000
        zero["stage3_max_live_parameters"] = max(size, BUCKET)
    settings: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Written even when 0: DeepSpeed clips at 1 if it is left out.
        "gradient_clipping": config.train.clip_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if config.train.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return _overlaid(settings, config.deepspeed.extra)


def _overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: (below[key], above[key]) for key in below.keys() & above.keys()}
    nested = {key: _overlaid(a, b) for key, (a, b) in both.items() if isinstance(a, dict) and isinstance(b, dict)}
    return below | above | nested
