"""Weights of the datasets of a mixture: from those in a configuration to small integers."""

import math
from collections.abc import Sequence
from fractions import Fraction

from data_pipeline.errors import ConfigError

LARGEST_PERIOD = 10_000
MOST_SOURCES = 16  # as many as a state of 1 KB can name

Weight = int | float | str | Fraction


def check_changes(changes: Sequence[tuple[int, Sequence[Weight]]]) -> list[tuple[int, ...]]:
    """Return the reduced weights of each change. Raises ConfigError for an invalid schedule, see `Schedule`."""
    starts = [start for start, _ in changes]
    if not changes or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ConfigError(f"weights change at positions {starts}; use ascending positions from 0")
    reduced = [reduce_weights(weights) for _, weights in changes]
    for start, weights in zip(starts, reduced, strict=True):
        if len(weights) != len(reduced[0]):
            raise ConfigError(f"{len(weights)} weights from position {start} for {len(reduced[0])} datasets")
    return reduced


def reduce_weights(weights: Sequence[Weight]) -> tuple[int, ...]:
    """Reduce weights as written (0.7 is 7/10, "1/3" is a third) to the smallest integers with the same ratios."""
    if not 1 <= len(weights) <= MOST_SOURCES:
        raise ConfigError(f"{len(weights)} weights; give one per dataset, 1 to {MOST_SOURCES}")
    try:
        exact = [weight if isinstance(weight, Fraction) else Fraction(str(weight)) for weight in weights]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"weights {[str(each) for each in weights]}: write numbers, or fractions such as 1/3"
        ) from None
    if min(exact) < 0 or not any(exact):
        raise ConfigError(
            f"weights {[str(weight) for weight in weights]}: each must be 0 or more, at least one above 0"
        )
    whole = [int(weight * math.lcm(*(each.denominator for each in exact))) for weight in exact]
    reduced = tuple(weight // math.gcd(*whole) for weight in whole)
    if sum(reduced) > LARGEST_PERIOD:
        raise ConfigError(
            f"weights {[str(weight) for weight in weights]} repeat after {sum(reduced)} samples, at most "
            f"{LARGEST_PERIOD} are supported; round them, for example to three digits"
        )
    return reduced
