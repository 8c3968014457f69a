"""A real S3 server for the tests: Ceph's RADOS gateway over one monitor and one object store in memory, on loopback."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from launchers.local import free_port

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
PACKAGES = "ceph-mon ceph-osd radosgw"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_DEFAULT_REGION": "us-east-1"}
OTHER = {**CREDENTIALS, "AWS_ACCESS_KEY_ID": "otherkey", "AWS_SECRET_ACCESS_KEY": "othersecret"}
"""A user who may do nothing in the buckets of the first, unless `allow` says so."""
START_S = 60

_CONFIG = """[global]
fsid = {fsid}
mon_host = [v1:127.0.0.1:{mon}/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_warn_on_pool_no_redundancy = false
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_class_load_list = *
osd_class_default_list = *
run_dir = {folder}/run
admin_socket = {folder}/run/$name.asok
log_file = {folder}/log/$name.log
pid_file = {folder}/run/$name.pid
mon_data = {folder}/mon
osd_data = {folder}/osd
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_data = {folder}/rgw
rgw_run_sync_thread = false
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Gateway:
    """Started in a folder of its own; `stop` ends its three processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir(parents=True)
        self._fsid = str(uuid.uuid4())
        self._mon_port = free_port()
        text = _CONFIG.format(fsid=self._fsid, mon=self._mon_port, folder=folder, port=self.port)
        (folder / "ceph.conf").write_text(text)

    def start(self) -> None:
        """Raises SubprocessError or TimeoutError. It sometimes fails with `wrong fsid`: try again."""
        monmap = f"{self.folder}/monmap"
        address = f"[v1:127.0.0.1:{self._mon_port}]"
        _run("monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", self._fsid, monmap)
        self._ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._ceph("ceph-mon", "-i", "a")
        store = str(uuid.uuid4())
        number = self._ceph("ceph", "--connect-timeout", "20", "osd", "new", store)
        self._ceph("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", store)
        self._ceph("ceph-osd", "-i", number)
        self._ceph("radosgw", "-n", "client.rgw")
        self._wait()
        for name in ("test", "other"):
            user = (f"--uid={name}", f"--display-name={name}", f"--access-key={name}key", f"--secret-key={name}secret")
            self._ceph("radosgw-admin", "-n", "client.rgw", "user", "create", *user)

    def limit_objects(self, bucket: str, count: int) -> None:
        """No more than `count` objects in the bucket; -1: as many as there is room for."""
        quota = ("--quota-scope=bucket", f"--bucket={bucket}", f"--max-objects={count}")
        self._ceph("radosgw-admin", "-n", "client.rgw", "quota", "set", *quota)
        self._ceph("radosgw-admin", "-n", "client.rgw", "quota", "enable" if count >= 0 else "disable", *quota[:2])

    def allow(self, bucket: str, actions: list[str], keys: str = "*") -> None:
        """The other user may do just this, with objects whose names fit the pattern."""
        where = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/{keys}"]
        self._set_policy(bucket, {"AWS": ["arn:aws:iam:::user/other"]}, actions, where)

    def allow_everybody(self, bucket: str) -> None:
        """Also who signs nothing may do everything."""
        self._set_policy(bucket, "*", ["s3:*"], [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"])

    def _set_policy(self, bucket: str, principal: Any, actions: list[str], where: list[str]) -> None:
        rule = {"Effect": "Allow", "Principal": principal, "Action": actions, "Resource": where}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
        self._client().put_bucket_policy(Bucket=bucket, Policy=policy)

    def make_bucket(self) -> str:
        """-> the name of a new bucket."""
        name = f"test-{uuid.uuid4().hex}"
        self._client().create_bucket(Bucket=name)
        return name

    def _client(self) -> Any:
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )

    def stop(self) -> None:
        """End what was started, by process id."""
        for file in (self.folder / "run").glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                continue

    def _ceph(self, program: str, *arguments: str) -> str:
        return _run(program, "-c", str(self.folder / "ceph.conf"), *arguments)

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(self.endpoint, timeout=2).close()
                return
            except OSError:
                if time.monotonic() > end:
                    raise TimeoutError(f"the gateway does not answer; see {self.folder}/log") from None
                time.sleep(0.1)


def start_gateway(folder: Path) -> Gateway:
    """A running gateway in a fresh folder below `folder`."""
    for attempt in range(3):
        gateway = Gateway(folder / str(attempt))
        try:
            gateway.start()
            return gateway
        except (subprocess.SubprocessError, TimeoutError):
            gateway.stop()
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def _run(*command: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=START_S, check=True
    )
    return done.stdout.strip()
