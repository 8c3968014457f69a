"""`python -m launchers.slurm_end RUN ...`: decide what follows the end of a job's attempt, for the batch script.

Prints `end`, `requeue`, or `requeue NODE,NODE` to requeue the job without these nodes. Imports no torch.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import NodeFault, Requeue
from launchers.causes import DECODING, Diagnosis, Failure, diagnose, worth_another_attempt
from launchers.watch import metrics_size
from pretrain.runtime.faults import crashed_while_decoding, read_faults
from pretrain.runtime.goodput import append_line, lines_of
from pretrain.runtime.mlflow_feed import FAILED, end_run

EXCLUDED = "excluded.jsonl"
"""File that records which nodes a job was told to exclude, and why."""

SIGNALLED = 128
"""A shell adds this to the number of the signal that ended a program, and exits with the sum."""
ASKED_TO_STOP = {
    Requeue.exit_code: "stopped and saved",
    # a program without a handler for the scheduler's warning dies of it: a build, whose finished shards stay
    SIGNALLED + signal.SIGUSR1: "time limit reached; finished work stays",
}


def verdict(
    diagnosis: Diagnosis, made_steps: bool, blamed: Sequence[str], gone: int, may_exclude: int
) -> tuple[bool, list[str]]:
    """Return (whether the job is requeued, the nodes that it must exclude from then on).

    blamed: nodes blamed for this fault; gone: number of nodes blamed before. If the fault recurs on more than
    `may_exclude` nodes, the nodes are not its cause and the job ends.
    """
    if not worth_another_attempt(diagnosis, made_steps):
        return False, []
    if diagnosis.cause != "node" or not blamed:
        return True, []
    within = gone + len(blamed) <= may_exclude
    return within, list(blamed) if within else []


def blamed_ranks(faults: Sequence[dict[str, Any]], world: int) -> list[int]:
    """Return the ranks that a watchdog blames; else those that wrote no fault, if at least half of all did."""
    for fault in faults:
        if "blamed" in fault:
            return sorted(fault["blamed"])
    told = {int(fault["rank"]) for fault in faults}
    silent = [rank for rank in range(world) if rank not in told]
    return silent if 2 * len(silent) <= world else []


def main(argv: Sequence[str] | None = None) -> None:
    """Read what the attempt left behind and print the verdict; the reason goes to stderr, the job's output."""
    args = _parser().parse_args(argv)
    faults, nodes, out = read_faults(args.run, args.faults_from), args.nodes.split(), args.out.replace("(null)", "")
    ranks = blamed_ranks(faults, len(nodes) * args.procs_per_node)
    diagnosis = diagnosis_of(args.status, faults, ranks)
    guilty = [rank for rank in ranks if not crashed_while_decoding(args.run, rank)]
    blamed = list(dict.fromkeys(nodes[rank // args.procs_per_node] for rank in guilty))
    earlier = (line.get("nodes", []) for line in lines_of(args.run / EXCLUDED) if line.get("job") == args.job)
    gone = sum(len(nodes) for nodes in earlier if isinstance(nodes, list))
    made_steps = metrics_size(args.run) > args.metrics_before
    goes_on, left_out = verdict(diagnosis, made_steps, blamed, gone, args.may_exclude)
    then = ("requeued" + (f" without {', '.join(left_out)}" if left_out else "")) if goes_on else "not requeued"
    why = diagnosis.why + DECODING * (guilty != ranks)
    print(f"tessera: exit code {args.status}, cause {diagnosis.cause}: {why}; {then}", file=sys.stderr)
    if left_out:
        append_line(args.run / EXCLUDED, {"job": args.job, "nodes": left_out, "why": diagnosis.why})
        left_out += [out] if out else []
    if not goes_on:
        end_run(args.run, FAILED)
    print(" ".join(["requeue", ",".join(left_out)]).strip() if goes_on else "end")


def diagnosis_of(status: int, faults: Sequence[dict[str, Any]], ranks: Sequence[int] = ()) -> Diagnosis:
    """Diagnose an attempt by its faults first: srun's `status` is only the highest exit code of its tasks.

    ranks: those to blame. The first fault counts: ranks that fail because they lost a peer write theirs later.
    """
    if not faults and status in ASKED_TO_STOP:
        return Diagnosis("preemption", ASKED_TO_STOP[status])
    first = min(faults, key=lambda fault: float(fault["time"]), default=None)
    if first is not None and first["cause"] != "node":
        return Diagnosis(first["cause"], first["why"])
    code = SIGNALLED - status if status > SIGNALLED else status
    failure = Failure(ranks[0] if ranks else 0, code)
    return diagnose([failure], faults, code if code > 0 and not faults else NodeFault.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launchers.slurm_end", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--status", type=int, required=True, help="exit code of srun")
    parser.add_argument("--faults-from", type=int, required=True, help="bytes of faults.jsonl before the attempt")
    parser.add_argument("--metrics-before", type=int, required=True, help="bytes of metrics.jsonl before the attempt")
    parser.add_argument("--nodes", required=True, help="nodes of the job in rank order, separated by spaces")
    parser.add_argument("--job", required=True)
    parser.add_argument("--out", default="", help="nodes excluded already, in Slurm's notation")
    parser.add_argument("--procs-per-node", type=int, required=True)
    parser.add_argument("--may-exclude", type=int, required=True)
    return parser


if __name__ == "__main__":
    main()
