"""`python -m launchers.slurm_end RUN ...`: what the end of a job's attempt means. The batch script asks it.

Prints `end`, `requeue`, or `requeue NODE,NODE`: back into the queue without these nodes. Imports no torch.
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
"""Which nodes a job was told to do without, and why."""

SIGNALLED = 128
"""A shell adds this to the number of the signal that ended a program."""
ASKED_TO_STOP = {
    Requeue.exit_code: "stopped and saved",
    # what did not catch the scheduler's announcement dies of it: a build, whose finished shards stand
    SIGNALLED + signal.SIGUSR1: "told that time is up; what is finished stays",
}


def verdict(
    diagnosis: Diagnosis, made_steps: bool, blamed: Sequence[str], gone: int, may_exclude: int
) -> tuple[bool, list[str]]:
    """-> (whether the job goes back into the queue, the nodes that it must do without from then on).

    blamed: nodes that this fault is put down to; gone: how many it has been put down to before. A fault that comes
    again on other nodes, more than `may_exclude` of them, is not theirs: the end.
    """
    if not worth_another_attempt(diagnosis, made_steps):
        return False, []
    if diagnosis.cause != "node" or not blamed:
        return True, []
    within = gone + len(blamed) <= may_exclude
    return within, list(blamed) if within else []


def blamed_ranks(faults: Sequence[dict[str, Any]], world: int) -> list[int]:
    """The ranks that a watchdog blames; else those that never said what became of them, where others did."""
    for fault in faults:
        if "blamed" in fault:
            return sorted(fault["blamed"])
    told = {int(fault["rank"]) for fault in faults}
    silent = [rank for rank in range(world) if rank not in told]
    return silent if 2 * len(silent) <= world else []


def main(argv: Sequence[str] | None = None) -> None:
    """Read what the attempt left behind, print the verdict; the reason goes to stderr, into the job's output."""
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
    then = ("back into the queue" + (f" without {', '.join(left_out)}" if left_out else "")) if goes_on else "the end"
    why = diagnosis.why + DECODING * (guilty != ranks)
    print(f"tessera: exit code {args.status}, cause {diagnosis.cause}: {why}; {then}", file=sys.stderr)
    if left_out:
        append_line(args.run / EXCLUDED, {"job": args.job, "nodes": left_out, "why": diagnosis.why})
        left_out += [out] if out else []
    if not goes_on:
        end_run(args.run, FAILED)
    print(" ".join(["requeue", ",".join(left_out)]).strip() if goes_on else "end")


def diagnosis_of(status: int, faults: Sequence[dict[str, Any]], ranks: Sequence[int] = ()) -> Diagnosis:
    """srun leaves with the highest code of its tasks: what the tasks wrote themselves says more.

    ranks: those to blame. Of faults the first counts: who is told of it by a lost peer writes later.
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
    parser.add_argument("--status", type=int, required=True, help="what srun left with")
    parser.add_argument("--faults-from", type=int, required=True, help="bytes of faults.jsonl before the attempt")
    parser.add_argument("--metrics-before", type=int, required=True, help="bytes of metrics.jsonl before the attempt")
    parser.add_argument("--nodes", required=True, help="of the job, in the order of its ranks, by blanks")
    parser.add_argument("--job", required=True)
    parser.add_argument("--out", default="", help="what it does without already, as Slurm writes it")
    parser.add_argument("--procs-per-node", type=int, required=True)
    parser.add_argument("--may-exclude", type=int, required=True)
    return parser


if __name__ == "__main__":
    main()
