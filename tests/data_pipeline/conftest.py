"""Small datasets, built in this process or by a real Ray."""

import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import BuildConfig
from data_pipeline.ingest import run
from data_pipeline.settings import check_settings


def png(seed: int = 0, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    return png


@pytest.fixture(scope="session")
def make_config() -> Callable[..., BuildConfig]:
    return lambda **tree: check_settings(BuildConfig, tree, "test")


@pytest.fixture(scope="session")
def in_this_process(make_config: Any) -> Callable[[pytest.MonkeyPatch], Callable[..., dict[str, Any]]]:
    """in_this_process(patch) -> build(config) with every shard made here: milliseconds instead of Ray's seconds."""

    def patched(patch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
        patch.setattr(run, "ray_session", lambda *_: contextlib.nullcontext())
        patch.setattr(run, "_submitter", lambda plan, task, _: lambda shard: task(plan, shard))
        patch.setattr(run, "run_tasks", lambda submit, items, *_: ((item, submit(item)) for item in items))
        return lambda **tree: run.build(make_config(**tree), progress=False)

    return patched


@pytest.fixture
def build_here(monkeypatch: pytest.MonkeyPatch, in_this_process: Any) -> Callable[..., dict[str, Any]]:
    """build(config) in this process, for one test."""
    built: Callable[..., dict[str, Any]] = in_this_process(monkeypatch)
    return built


@pytest.fixture
def scenes(build_here: Any, tmp_path: Path) -> Path:
    """25 scenes in shards of 10."""
    output = tmp_path / "scenes"
    build_here(source={"kind": "scenes", "count": 25}, output=str(output), shard_size=10)
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images with captions beside them, in two folders."""
    for number, name in enumerate(["a/0", "a/1", "b/0", "b/1", "b/2", "c"]):
        path = tmp_path / "raw" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        if number % 2:
            path.with_suffix(".json").write_text(
                json.dumps({"captions": [f"picture {number}", "图片"], "score": number})
            )
        else:
            path.with_suffix(".txt").write_text(f"picture {number}\n")
    return tmp_path / "raw"


@pytest.fixture(scope="session")
def tree_digests() -> Callable[[Path], dict[str, str]]:
    """Every file of a dataset with its sha256."""
    return lambda root: {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, whole or by one byte range, as any object store serves them."""

    def log_message(self, *_: object) -> None:
        return None

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or len(data) - 1)) if match else (0, len(data) - 1)
        body = data[first : last + 1]
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if match:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """serve(folder) -> address of a server of its files, with byte ranges."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(folder: Path) -> str:
        handler = functools.partial(RangeHandler, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def by_tarfile() -> Callable[[Path], list[dict[str, Any]]]:
    """The samples of a dataset's tars as the standard library reads them: the independent reference."""

    def read(root: Path) -> list[dict[str, Any]]:
        samples = []
        for path in sorted(root.glob("*.tar")):
            with tarfile.open(path) as tar:
                files = [(member.name.split("."), tar.extractfile(member).read()) for member in tar.getmembers()]
            for key, group in itertools.groupby(files, key=lambda item: item[0][0]):
                samples.append({"key": key, **{name[1]: data for name, data in group}})
        return samples

    return read
