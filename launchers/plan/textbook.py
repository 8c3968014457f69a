"""Formulas of papers, for comparison; the costs of our own engine are in trace, memory and traffic.

Letters: L layers, D width, S sequence, B rows, H heads, V vocabulary, N parameters, W ranks.
"""


def states_bytes(parameters: int, world: int, stage: int, fp32_gradients: bool = False) -> float:
    """Bytes per rank of weights and gradients in bf16, master weights and two moments in float32.

    Rajbhandari et al. 2020, arXiv:1910.02054.
    """
    gradients = 4 if fp32_gradients else 2
    shared = {"weights": 2, "gradients": gradients, "optimizer": 12}
    from_stage = {"weights": 3, "gradients": 2, "optimizer": 1}
    return sum(parameters * size / (world if stage >= from_stage[name] else 1) for name, size in shared.items())


def flops_per_token(parameters: int, layers: int, width: int, length: int) -> int:
    """Forward and backward FLOPs per token of a causal transformer, attention not halved: 6 N + 12 L D S.

    Chowdhery et al. 2022, app. B.
    """
    return 6 * parameters + 12 * layers * width * length


def mfu(flops_per_unit: float, units_per_s: float, devices: int, peak: float) -> float:
    """Return the share of the peak that a measured throughput needs."""
    return flops_per_unit * units_per_s / (devices * peak)


def layer_activation_bytes(length: int, rows: int, width: int, heads: int, flash: bool = True) -> int:
    """Activation bytes of a layer in 16 bits with dropout: S B D (34 + 5 H S / D); flash drops the second term.

    Korthikanti et al. 2022, arXiv:2205.05198, eq. 2.
    """
    return length * rows * width * 34 + (0 if flash else 5 * heads * length**2 * rows)


def transformer_flops(layers: int, width: int, middle: int, tokens: int) -> int:
    """Forward FLOPs of one sequence: weights of attention and MLP, scores and their product with the values."""
    return layers * (2 * tokens * (4 * width**2 + 2 * width * middle) + 4 * tokens**2 * width)
