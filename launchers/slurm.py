"""Render a RunSpec as a batch script that a site can read and edit, and submit it. Facts: man sbatch, srun, scontrol.

`--signal` without `B:` reaches the processes themselves, which save and exit with 75. slurm_end.py decides from what
the processes wrote whether the script requeues the job.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, storage_errors
from data_pipeline.outputs import write_whole
from launchers.local import FIRST_PORT, PORTS, say
from launchers.pipeline import Step
from launchers.quoting import Shell, command_line, comment, directive, quoted
from launchers.slurm_jobs import END, hand_in, take_back
from launchers.spec import RAY_OPTION, RunSpec, SlurmCluster, check_gpus, seconds_of
from launchers.watch import JOB, refuse_second_launch, write_record
from pretrain.runtime.faults import FAULTS
from pretrain.runtime.goodput import METRICS

SCRIPT_NAME = "job.sbatch"

START = """set -euo pipefail
run={folder}
mkdir -p -- "$run\""""

COMMAND = """# A task that exits does not end the others: all may be writing the same save.
status=0
srun --distribution=block --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait={wait} {container}\\
  {command} || status=$?
echo "$SLURM_JOB_ID ${{SLURM_RESTART_COUNT:-0}} $status" > "$run/{END}\""""

EXIT = 'exit "$status"'

FIRST_HOST = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
ADDRESS = {
    "hostname": FIRST_HOST,
    "node_addr": f'$(scontrol show node --oneliner "{FIRST_HOST}" | sed "s/.* NodeAddr=\\([^ ]*\\).*/\\1/")',
}
RENDEZVOUS = f"""\
# Address of rank 0; set either variable before sbatch or above to choose another network or port.
export MASTER_ADDR="${{{{MASTER_ADDR:-{{address}}}}}}"
export MASTER_PORT="${{{{MASTER_PORT:-$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))}}}}\""""

TOKEN = """\
# Ray requires this token; without one anybody on the network could run programs through it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')\""""

ATTEMPT = 'export TESSERA_ATTEMPT="${SLURM_RESTART_COUNT:-0}"'

SIZES = f"""\
# Sizes of the run's files before this attempt.
size() {{ stat --format=%s -- "$1" 2> /dev/null || echo 0; }}
faults="$(size "$run/{FAULTS}")" metrics="$(size "$run/{METRICS}")\""""

REQUEUE = """\
# Requeue after a save before the time limit, a preemption or a node fault, then without that node; not after a
# wrong configuration, an error of user code, or storage that never worked. The run's folder tells which it was.
job={job}
if [ "$status" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
  out="$(squeue --noheader --format=%x --job="$job")" || out=
  verdict="$({judge} "$run" --job "$job" --status "$status" \\
    --faults-from "$faults" --metrics-before "$metrics" --out "$out" \\
    --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST")" {judged})" || verdict=end
  if [ "${{verdict%% *}}" = requeue ]; then
    trap '' TERM  # sent by the requeue to this script, before the nodes to exclude are set
    scontrol requeue "$job" || true  # refused after `tessera stop`
    [ "$verdict" = requeue ] || scontrol update JobId="$job" ExcNodeList="${{verdict#* }}"
  fi
fi"""

TASK_NUMBER = Shell('"$SLURM_ARRAY_TASK_ID"')
RAY = Shell('"$MASTER_ADDR:$MASTER_PORT"')
OPTION = re.compile(r"-{0,2}(?P<name>[A-Za-z][\w-]*)(?:(?:=|\s+)(?P<value>.*))?", re.ASCII | re.DOTALL)
LARGEST_SEED = 4_000_000  # Slurm's largest index of an array


# ------------------------------------------------------------------------------------------------ the script


def render(spec: RunSpec, cluster: SlurmCluster, seeds: str = "", after: Sequence[str] = ()) -> str:
    """Render the batch script.

    seeds: an array in sbatch's notation, 0-3 or 1,5,9. after: jobs that must have succeeded.
    Every value goes through `launchers.quoting`; only `setup` is shell code. Raise ConfigError for a job that no site
    can run.
    """
    _check(spec, cluster, seeds)
    comes_back = cluster.requeues > 0 and spec.goes_on
    spec = spec.with_workers(spec.nodes * _cpus_per_task(spec, cluster))
    folder = quoted(spec.run_folder, "/seed-", TASK_NUMBER) if seeds else quoted(spec.run_folder)
    head = ["#!/bin/bash", *map(comment, spec.header), *_directives(spec, cluster, seeds, after)]
    blocks = [
        "\n".join(head),
        "\n".join([START.format(folder=folder), *cluster.setup]),
        "\n".join(_exports(spec, cluster)),
        *([SIZES] if comes_back else []),
        COMMAND.format(
            cpus=_cpus_per_task(spec, cluster),
            wait=cluster.signal_lead_s,
            container=_srun_container(cluster),
            command=command_line([*_inside(cluster, spec), cluster.python, *_program(spec, cluster, seeds)]),
            END=END,
        ),
        *([_requeue(spec, cluster, seeds)] if comes_back else []),
    ]
    return "\n\n".join(blocks) + f"\n{EXIT}\n"


def _exports(spec: RunSpec, cluster: SlurmCluster) -> list[str]:
    """Return the lines that set the environment of the job's processes. Ray sets each one's number of threads."""
    threads = {} if spec.task in ("build", "encode") else {"OMP_NUM_THREADS": str(cluster.cpus_per_proc)}
    values = {**threads, **spec.environment}
    return [
        *([RENDEZVOUS.format(address=ADDRESS[cluster.master_addr])] if spec.saves or spec.on_ray else []),
        *([TOKEN] if spec.on_ray else []),
        ATTEMPT,
        *(f"export {name}={quoted(value)}" for name, value in values.items()),
    ]


def _check(spec: RunSpec, cluster: SlurmCluster, seeds: str) -> None:
    seeds_of(seeds)
    if spec.task == "train":
        of_gres = re.search(r"gpu(?::[^:,]+)?:(\d+)", cluster.gres)
        check_gpus(spec.procs_per_node, cluster.gpus_per_node or int(of_gres[1] if of_gres else 0))
    limit = seconds_of(cluster.time_limit)
    if spec.saves and cluster.signal_lead_s >= limit:
        raise ConfigError(
            f"signal_lead_s={cluster.signal_lead_s} is not shorter than time_limit={cluster.time_limit} ({limit} s): "
            "the stop signal would come at the start; raise the limit or lower the lead"
        )
    if cluster.container != "none" and not cluster.container_image:
        raise ConfigError(f"container={cluster.container!r} without container_image; name the image or use 'none'")
    if seeds and spec.task != "train":
        raise ConfigError(f"--seeds {seeds} with task {spec.task}: seeds are for training")


def _words_of_seed(spec: RunSpec) -> list[Shell]:
    """Return the overrides of one array task: its seed, its own folder, and its own checkpoint location."""
    elsewhere = [quoted("train.checkpoints=", spec.checkpoints, "/seed-", TASK_NUMBER)] if spec.checkpoints else []
    return [quoted("seed=", TASK_NUMBER), quoted("run=", Shell('"$run"')), *elsewhere]


def _directives(spec: RunSpec, cluster: SlurmCluster, seeds: str, after: Sequence[str]) -> list[str]:
    """Return the #SBATCH lines, without those that the site leaves empty."""
    optional = {
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "gres": cluster.gres if spec.wants_gpus else "",
        "gpus-per-node": _gpus(spec, cluster) or "",
        "array": seeds,
        "dependency": f"afterok:{':'.join(after)}" if after else "",
        "kill-on-invalid-dep": "yes" if after else "",
    }
    return [
        directive("job-name", spec.name),
        directive("nodes", spec.nodes),
        directive("ntasks-per-node", _tasks_per_node(spec, cluster)),
        directive("cpus-per-task", _cpus_per_task(spec, cluster)),
        directive("mem", cluster.memory),
        *(directive(name, value) for name, value in optional.items() if value),
        *([directive("exclusive")] if cluster.exclusive else []),
        directive("time", cluster.time_limit),
        *([directive("signal", f"USR1@{cluster.signal_lead_s}")] if spec.goes_on else []),
        directive("requeue" if cluster.requeues else "no-requeue"),
        directive("open-mode", "append"),
        directive("output", cluster.output.replace("%j", "%A_%a") if seeds else cluster.output),
        *map(_option, cluster.options),
    ]


def _option(text: str) -> str:
    """Return the line of one of `options`, with or without dashes: reservation=x, --reservation x, -C gpu, exclusive.

    Raise ConfigError for anything else.
    """
    found = OPTION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"options: {text!r} is not an option of sbatch; write NAME or NAME=VALUE, as reservation=x")
    return directive(found["name"], found["value"])


def _tasks_per_node(spec: RunSpec, cluster: SlurmCluster) -> int:
    """Return the tasks per node: 1 where torchrun or Ray starts a node's processes."""
    return spec.procs_per_node if cluster.start == "srun" else 1


def _cpus_per_task(spec: RunSpec, cluster: SlurmCluster) -> int:
    """Return the CPUs per task: training divides the node's CPUs among its processes, other tasks get all of them."""
    whole = cluster.cpus_per_proc * (spec.procs_per_node if spec.task == "train" else cluster.procs_per_node)
    return whole // _tasks_per_node(spec, cluster)


def _gpus(spec: RunSpec, cluster: SlurmCluster) -> int:
    """Return the GPUs per node: all to train or encode, one to generate or evaluate, none to read and write."""
    if spec.task in ("train", "encode"):
        return cluster.gpus_per_node
    return min(1, cluster.gpus_per_node) if spec.wants_gpus else 0


# ----------------------------------------------------------------------------------------- the srun command


def _program(spec: RunSpec, cluster: SlurmCluster, seeds: str) -> tuple[str, ...]:
    """Return the arguments of the interpreter in each task."""
    if spec.on_ray:
        told = ("--nodes", str(spec.nodes), "--cpus", str(_cpus_per_task(spec, cluster)))
        return ("-m", "launchers.ray_nodes", *told, "--", *spec.arguments, quoted(RAY_OPTION[spec.task], RAY))
    command = (*spec.command, *(_words_of_seed(spec) if seeds else ()))
    if spec.task == "train" and cluster.start == "torchrun":
        size = (f"--nnodes={spec.nodes}", f"--nproc-per-node={spec.procs_per_node}")
        return ("-m", "launchers.torchrun", *size, *command)
    return command


def _srun_container(cluster: SlurmCluster) -> str:
    """Return srun's container options, with a trailing blank; pyxis only."""
    if cluster.container != "pyxis":
        return ""
    options = [f"--container-image={cluster.container_image}"]
    if cluster.container_mounts:
        options.append("--container-mounts=" + ",".join(cluster.container_mounts))
    return command_line([*options, quoted("--container-workdir=", Shell('"$PWD"'))]) + " "


def _inside(cluster: SlurmCluster, spec: RunSpec) -> list[str]:
    """Return the words before the interpreter; apptainer only."""
    if cluster.container != "apptainer":
        return []
    binds = [part for mount in cluster.container_mounts for part in ("--bind", mount)]
    devices = ["--nv"] if spec.wants_gpus and (cluster.gpus_per_node or cluster.gres) else []
    return ["apptainer", "exec", *devices, *binds, cluster.container_image]


def _requeue(spec: RunSpec, cluster: SlurmCluster, seeds: str) -> str:
    """Return the part of the script that runs slurm_end.py, inside the container if there is one, and requeues."""
    container = _srun_container(cluster)
    judge = command_line([*_inside(cluster, spec), cluster.python, "-m", "launchers.slurm_end"])
    return REQUEUE.format(
        # the job number of an array alone would name all of its tasks
        job='"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if seeds else '"$SLURM_JOB_ID"',
        requeues=cluster.requeues,
        judge=f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 {container}{judge}" if container else judge,
        judged=f"--procs-per-node {spec.procs_per_node} --may-exclude {cluster.max_excluded_nodes}",
    )


# ------------------------------------------------------------------------------------------------ submission


def submit(step: Step[SlurmCluster], seeds: str = "", after: Sequence[str] = ()) -> dict[str, Any]:
    """Write the script into the run's folder and submit it with sbatch; return {"job", "script", "run"}.

    Raise ConfigError if there is no sbatch, if the run is queued or running already, and with the scheduler's message
    if it refuses; NodeFault if it does not answer.
    """
    spec = step.spec
    text = render(spec, step.cluster, seeds, after)
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch on this machine; go to a login node, or print the script with --dry-run")
    folder = Path(spec.run_folder)
    refuse_second_launch(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    script = folder / SCRIPT_NAME
    write_whole(script, text.encode())
    job = hand_in(script, spec.name)
    try:
        _note(step, job, seeds)
    except BaseException:
        say(take_back([job]))
        raise
    return {"job": job, "script": str(script), "run": spec.run_folder}


def _note(step: Step[SlurmCluster], job: str, seeds: str) -> None:
    """Write the run's job.json (and each seed's), so that the job can be found again."""
    spec, folder = step.spec, Path(step.spec.run_folder)
    script = folder / SCRIPT_NAME
    record = {"place": "slurm", "job": job, "name": spec.name, "saves": spec.saves, "script": str(script)}
    output = Path.cwd() / step.cluster.output.replace("%x", spec.name)
    write_record(folder, record | {"output": str(output).replace("%j", job)}, JOB)
    for seed in seeds_of(seeds):
        one = f"{job}_{seed}"
        write_record(folder / f"seed-{seed}", record | {"job": one, "output": str(output).replace("%j", one)}, JOB)


def submit_all(steps: Sequence[Step[SlurmCluster]], seeds: str = "") -> list[dict[str, Any]]:
    """Submit a pipeline. If a step fails or this is interrupted, cancel the submitted steps and print that."""
    jobs: dict[str, dict[str, Any]] = {}
    for step in steps:  # render all before submitting any, so that a mistake in the last one costs nothing
        render(step.spec, step.cluster, seeds)
    try:
        for step in steps:
            jobs[step.name] = submit(step, seeds, [jobs[name]["job"] for name in step.after])
    except BaseException:
        if jobs:
            say(take_back([job["job"] for job in jobs.values()]))
        raise
    return list(jobs.values())


def render_all(steps: Sequence[Step[SlurmCluster]], seeds: str = "") -> str:
    """Return the scripts of all steps, with <NAME> in place of the number of each job that a step waits for."""
    return "\n".join(render(step.spec, step.cluster, seeds, [f"<{name}>" for name in step.after]) for step in steps)


def seeds_of(text: str) -> list[int]:
    """Parse 0-3 or 1,5,9 into the list of seeds. Raise ConfigError for anything else."""
    seeds: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.partition("-")
        numbers = [first, last] if dash else [first]
        if not all(re.fullmatch("[0-9]{1,7}", number) and int(number) <= LARGEST_SEED for number in numbers):
            raise ConfigError(
                f"--seeds {text}: {part!r} is neither a number up to {LARGEST_SEED} nor a range; write 0-3 or 1,5,9"
            )
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds) or (text and not seeds):
        raise ConfigError(f"--seeds {text}: a seed occurs twice, or none is given; write 0-3 or 1,5,9")
    return seeds
