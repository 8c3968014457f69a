"""`python -m launchers.ray_nodes --nodes N --cpus C -- COMMAND`: one Ray cluster over a job's nodes, a task on each.

The task of node 0 starts Ray's head at MASTER_ADDR:MASTER_PORT, waits until all N nodes have joined, and runs the
`tessera` command there; the other tasks lend their node until the head is gone. `ray symmetric-run` is similar, but
ends with `ray stop`, which kills every Ray process of the machine, and refuses to start where another Ray runs.
"""

import argparse
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from data_pipeline.errors import NodeFault
from data_pipeline.workers import sign_in
from launchers.children import die_with
from launchers.local import say

JOIN_TIMEOUT_S = 300.0
"""Seconds until all nodes must have joined; nodes differ in how long they take to start a program."""
POLL_S = 0.2
LOST_AFTER = 3
"""Consecutive refused connections, one per second, after which the head counts as gone."""
QUIET = ("--disable-usage-stats", "--block")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of the command on node 0; 0 on the others, which only lend their CPUs."""
    parser = argparse.ArgumentParser(prog="python -m launchers.ray_nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--cpus", type=int, required=True, help="CPUs of this node for Ray")
    parser.add_argument("command", nargs="+", help="arguments of `tessera`, after --")
    args = parser.parse_args(argv)
    sign_in()
    host, port = address_of(os.environ["MASTER_ADDR"]), int(os.environ["MASTER_PORT"])
    folder = f"/tmp/tessera-{os.environ['SLURM_JOB_ID']}"  # /tmp/ray may be another user's; sockets need short names
    if os.environ["SLURM_NODEID"] != "0":
        code = lend(host, port, args.cpus)
        shutil.rmtree(folder, ignore_errors=True)  # Ray uses the head's folder on this node too
        return code
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
    with ray_node(*head, f"--node-ip-address={host}", f"--num-cpus={args.cpus}") as ray:
        wait_for_nodes(f"{host}:{port}", args.nodes, ray)
        code = subprocess.run([sys.executable, "-m", "launchers.cli", *args.command], check=False).returncode
    if code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def address_of(name: str) -> str:
    """Return the IPv4 address of node 0. Raise NodeFault for a name that does not resolve here."""
    try:
        return socket.gethostbyname(name)
    except (OSError, UnicodeError) as error:
        raise NodeFault(
            f"MASTER_ADDR={name!r} does not resolve on {socket.gethostname()} ({error}); fix name resolution, or set "
            "master_addr: node_addr in the cluster file"
        ) from None


def lend(host: str, port: int, cpus: int) -> int:
    """Join the head and stay until it is gone. Raise NodeFault if it never starts, or if this node's Ray ends first."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while (own := _address_towards(host, port)) is None:
        if time.monotonic() > deadline:
            raise NodeFault(f"no Ray at {host}:{port} within {JOIN_TIMEOUT_S:.0f} s; see the output of node 0")
        time.sleep(POLL_S)
    with ray_node(f"--address={host}:{port}", f"--node-ip-address={own}", f"--num-cpus={cpus}") as ray:
        refused = 0
        while refused < LOST_AFTER and ray.poll() is None:
            time.sleep(1.0)
            refused = 0 if _address_towards(host, port) else refused + 1
        if not refused and _address_towards(host, port):
            raise NodeFault(
                f"Ray on this node ended with code {ray.returncode}, but its head is still at {host}:{port}"
            )
    return 0


@contextlib.contextmanager
def ray_node(*options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `ray start --block`; on exit, end it and all processes that it started."""
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *QUIET]
    env = {"RAY_worker_niceness": "0", **os.environ}  # the job owns its CPUs, so Ray need not yield
    child = subprocess.Popen(
        argv, process_group=0, preexec_fn=die_with(os.getpid()), stdout=subprocess.DEVNULL, env=env
    )
    try:
        yield child
    finally:
        child.terminate()  # --block forwards it to Ray's processes
        try:
            child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def wait_for_nodes(address: str, nodes: int, head: "subprocess.Popen[bytes]") -> None:
    """Wait until `nodes` nodes have joined. Raise NodeFault if the head ends or they do not join in time."""
    import ray

    deadline = time.monotonic() + JOIN_TIMEOUT_S
    host, _, port = address.rpartition(":")
    while _address_towards(host, int(port)) is None:
        if head.poll() is not None or time.monotonic() > deadline:
            raise NodeFault(f"Ray's head did not start at {address} (exit code {head.returncode})")
        time.sleep(POLL_S)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        while (here := sum(node["Alive"] for node in ray.nodes())) < nodes:
            if head.poll() is not None or time.monotonic() > deadline:
                raise NodeFault(f"{here} of {nodes} nodes joined Ray at {address}; see the output of the others")
            time.sleep(POLL_S)
    finally:
        ray.shutdown()
    say(f"Ray at {address}: {here} nodes")


def _address_towards(host: str, port: int) -> str | None:
    """Return this machine's own address in a connection to host:port; None if nothing answers there."""
    try:
        with socket.create_connection((host, port), timeout=10) as connection:
            return str(connection.getsockname()[0])
    except OSError:
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NodeFault as error:
        say(str(error))
        sys.exit(NodeFault.exit_code)
