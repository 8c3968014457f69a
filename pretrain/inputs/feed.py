"""The batches of a rank, step by step, prepared ahead of the training thread.

Step t consumes positions [t * G, (t + 1) * G) of the stream; rank r of W takes the r-th contiguous W-th of them, in
micro-batches. What a step holds depends on t alone: preparing it early, late or again changes nothing.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from data_pipeline.schema import Sample
from data_pipeline.stream.reader import Stream

Batch = dict[str, Tensor]


class Feed:
    """Iterate from a step on: yields (positions [start, stop) of the whole step, this rank's micro-batches)."""

    def __init__(
        self,
        stream: Stream,
        inputs: Callable[[list[Sample]], Batch],
        global_batch: int,
        shard: tuple[int, int],
        micro_batch: int,
        prefetch_steps: int,
    ) -> None:
        self.stream = stream
        self.inputs = inputs
        self.global_batch = global_batch
        self.shard = shard
        self.micro_batch = micro_batch
        self.prefetch_steps = prefetch_steps
        self.waited_s = 0.0
        """How long the training thread has waited for data, in total."""

    def steps(self, start: int, stop: int) -> Iterator[tuple[tuple[int, int], list[Batch]]]:
        """The steps [start, stop), in order."""
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            ahead: dict[int, Future[list[Batch]]] = {}
            try:
                for step in range(start, stop):
                    for later in range(step, min(stop, step + 1 + self.prefetch_steps)):
                        if later not in ahead:
                            ahead[later] = pool.submit(self.step, later)
                    began = time.monotonic()
                    batches = ahead.pop(step).result()
                    self.waited_s += time.monotonic() - began
                    yield (step * self.global_batch, (step + 1) * self.global_batch), batches
            finally:
                for future in ahead.values():
                    future.cancel()

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one step."""
        rank, world = self.shard
        part = self.global_batch // world
        first = step * self.global_batch + rank * part
        samples = self.stream.read(first, first + part)
        return [self.inputs(samples[at : at + self.micro_batch]) for at in range(0, part, self.micro_batch)]
