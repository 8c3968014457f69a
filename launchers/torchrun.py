"""`python -m launchers.torchrun --nnodes N --nproc-per-node P -m MODULE ...`: torchrun on one node of a Slurm job.

torchrun itself exits with 1 whatever its processes exited with, and dies of the signal by which Slurm announces the
time limit. This wrapper keeps the exit code and ignores the signal. Ranks follow the order of the job's nodes.
"""

import os
import signal
import sys
from collections.abc import Sequence

from launchers.local import exit_code_of


def main(argv: Sequence[str]) -> int:
    """Run torchrun and return the most informative exit code of this node's processes."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Slurm signals every process of a step: training processes save, this one waits for them.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    told = [
        f"--node-rank={os.environ['SLURM_NODEID']}",
        f"--master-addr={os.environ['MASTER_ADDR']}",
        f"--master-port={os.environ['MASTER_PORT']}",
        "--max-restarts=0",
    ]
    stopped = False
    try:
        run.main([*told, *argv])
    except ChildFailedError as error:
        return exit_code_of([failure.exitcode for failure in error.failures.values()], stopped)
    except SignalException:
        stopped = True
        return exit_code_of([-signal.SIGTERM], stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
