"""RunSpec -> a batch script that a site can read and edit, and its submission. Facts: man sbatch, man srun.

One srun task per process. `--signal` without `B:` reaches the processes themselves, which save and leave with 75; the
script then puts the job back into the queue, at most `requeues` times.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

from data_pipeline.errors import ConfigError
from launchers.spec import RunSpec, SlurmCluster, check_gpus

SUBMIT_TIMEOUT_S = 60

SCRIPT = """#!/bin/bash
# {header}
{directives}

set -euo pipefail
{setup}
{rendezvous}
export TESSERA_ATTEMPT="${{SLURM_RESTART_COUNT:-0}}"
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
{env}
# A task that leaves does not take the others with it: all may be in the middle of the same save.
status=0
srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait={wait} {container}\\
  {command} || status=$?
{requeue}
exit "$status"
"""

RENDEZVOUS = """
# Every task finds rank 0 here; set either variable before sbatch to choose another network or port.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}\""""

REQUEUE = """
# 75: the run saved before its time limit and wants to go on.
if [ "$status" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi"""


def render(spec: RunSpec, cluster: SlurmCluster) -> str:
    """The batch script. Raises ConfigError for what no site can run."""
    check_gpus(spec.procs_per_node, cluster.gpus_per_node)
    text = SCRIPT.format(
        header=spec.header,
        directives="\n".join(f"#SBATCH {line}" for line in _directives(spec, cluster)),
        setup="\n".join(cluster.setup),
        rendezvous=RENDEZVOUS if spec.task == "train" else "",
        env="".join(f"export {name}={shlex.quote(value)}\n" for name, value in spec.environment.items()),
        cpus=cluster.cpus_per_proc,
        wait=cluster.signal_lead_s,
        container=_srun_container(cluster),
        command=shlex.join([*_inside(cluster), cluster.python, *spec.command]),
        requeue=REQUEUE.format(requeues=cluster.requeues) if cluster.requeues and spec.task == "train" else "",
    )
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def _directives(spec: RunSpec, cluster: SlurmCluster) -> list[str]:
    """The #SBATCH lines, without those that the site leaves empty."""
    optional = {
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "gres": cluster.gres,
        "gpus-per-node": cluster.gpus_per_node or "",
    }
    return [
        f"--job-name={spec.name}",
        f"--nodes={spec.nodes}",
        f"--ntasks-per-node={spec.procs_per_node}",
        f"--cpus-per-task={cluster.cpus_per_proc}",
        f"--mem={cluster.memory}",
        *(f"--{name}={value}" for name, value in optional.items() if value),
        *(["--exclusive"] if cluster.exclusive else []),
        f"--time={cluster.time_limit}",
        # A build has nothing to save: what is finished stays, and the same command goes on from it.
        *([f"--signal=USR1@{cluster.signal_lead_s}"] if spec.task == "train" else []),
        "--requeue" if cluster.requeues else "--no-requeue",
        "--open-mode=append",
        f"--output={cluster.output}",
    ]


def _srun_container(cluster: SlurmCluster) -> str:
    """Options of srun itself, with a blank behind: pyxis only."""
    if cluster.container != "none" and not cluster.container_image:
        raise ConfigError(f"container={cluster.container!r} without container_image; name the image or use 'none'")
    if cluster.container != "pyxis":
        return ""
    options = [f"--container-image={cluster.container_image}"]
    if cluster.container_mounts:
        options.append("--container-mounts=" + ",".join(cluster.container_mounts))
    return shlex.join(options) + ' --container-workdir="$PWD" '


def _inside(cluster: SlurmCluster) -> list[str]:
    """What stands before the interpreter: apptainer only."""
    if cluster.container != "apptainer":
        return []
    binds = [part for mount in cluster.container_mounts for part in ("--bind", mount)]
    devices = ["--nv"] if cluster.gpus_per_node or cluster.gres else []
    return ["apptainer", "exec", *devices, *binds, cluster.container_image]


def submit(spec: RunSpec, cluster: SlurmCluster) -> tuple[str, Path]:
    """Write the script into the run's folder and hand it to sbatch -> (job id, script).

    Raises ConfigError where there is no sbatch, and with the scheduler's own words where it refuses.
    """
    text = render(spec, cluster)
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch on this machine; go to a login node, or print the script with --dry-run")
    script = Path(spec.run_folder) / "job.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0], script
