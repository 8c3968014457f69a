"""The build as a user runs it, through the command line in processes of its own: what it says and how it leaves."""

import io
import json
import subprocess
import sys
import tarfile

import pyarrow.parquet as pq
import pytest

from launchers import cli
from tests.data_pipeline.web import Web

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture
def tessera(repository, tmp_path):
    """tessera(words) -> the ended process; nothing but its exit code and what it printed is looked at."""

    def call(*words):
        command = [sys.executable, "-m", "launchers.cli", "data", *map(str, words)]
        ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=400)
        assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
        return ended

    return call


@pytest.fixture
def web(tmp_path, make_png):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(make_png(number))
    with Web(folder) as server:
        yield server


def add_rows(path, web, names):
    with path.open("a") as file:
        for name in names:
            file.write(json.dumps({"id": name, "image": f"{web.address}/file/{name}.png", "caption": name}) + "\n")


def test_build_retry_grow_verify_index(tessera, web, tmp_path, make_png):
    add_rows(tmp_path / "rows.jsonl", web, ["0", "1", "late", "2", "never"])
    config, output = tmp_path / "build.yaml", tmp_path / "set"
    source = {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl", "key": "id"}
    fetch = {"allow_networks": ["127.0.0.0/8"]}
    config.write_text(json.dumps({"source": source, "output": str(output), "shard_size": 2, "fetch": fetch}))

    built = tessera("build", config, "--json")
    assert built.returncode == 0, built.stderr
    first = json.loads(built.stdout)
    assert (first["in"], first["out"], first["rejected"], first["shards"]) == (5, 3, {"http_404": 2}, 3)
    stands = {path.name: path.read_bytes() for path in output.glob("0*")}

    again = tessera("build", config, "--json")  # nothing to do
    assert (again.returncode, json.loads(again.stdout)) == (0, first)

    (web.folder / "late.png").write_bytes(make_png(7))
    tried = tessera("retry", config, "--json")
    assert tried.returncode == 0, tried.stderr
    assert json.loads(tried.stdout)["rejected"] == {"http_404": 1}

    add_rows(tmp_path / "rows.jsonl", web, ["3", "4"])
    refused = tessera("build", config, "--json")
    assert refused.returncode == 64 and "grow=true" in refused.stderr
    grown = tessera("build", config, "grow=true", "--json")
    assert grown.returncode == 0, grown.stderr
    last = json.loads(grown.stdout)
    assert (last["in"], last["out"], last["rejected"], last["shards"]) == (7, 6, {"http_404": 1}, 5)
    assert {name: (output / name).read_bytes() for name in stands} == stands
    assert [row["key"] for row in pq.read_table(output / "rejects.parquet").to_pylist()] == ["never"]

    checked = tessera("verify", output, "--json")
    assert checked.returncode == 0 and json.loads(checked.stdout)["fingerprint"] == last["fingerprint"]
    ordered = tessera("order", output, "--count", 6)
    assert sorted(ordered.stdout.split()) == ["0", "1", "2", "3", "4", "late"]

    for path in output.glob("*.tar"):  # as tars that were made elsewhere
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    indexed = tessera("index", tmp_path / "bare", "--json")
    assert indexed.returncode == 0 and json.loads(indexed.stdout)["samples"] == 6
    assert (tmp_path / "bare/manifest.json").read_bytes() == (output / "manifest.json").read_bytes()

    shard = output / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])  # cut between two files
    broken = tessera("verify", output)
    assert broken.returncode == 74 and "00001.tar" in broken.stderr


def test_a_build_onto_a_bucket_is_the_local_one(tessera, tmp_path, bucket):
    config = tmp_path / "build.yaml"
    config.write_text(f"source: {{kind: scenes, count: 50}}\noutput: {tmp_path}/local\nshard_size: 20\n")
    outputs = [f"{bucket}/set", f"{tmp_path}/local"]
    built = [json.loads(tessera("build", config, f"output={output}", "--json").stdout) for output in outputs]
    checked = tessera("verify", outputs[0], "--json")
    assert checked.returncode == 0 and json.loads(checked.stdout)["samples"] == 50
    assert built[0] == {**built[1], "dataset": outputs[0]}


def test_two_commands_that_build_the_same_at_once_both_end_well(repository, tmp_path, bucket):
    config = tmp_path / "build.yaml"
    config.write_text(f"source: {{kind: scenes, count: 400}}\noutput: {bucket}/set\nshard_size: 10\nworkers: 1\n")
    command = [sys.executable, "-m", "launchers.cli", "data", "build", str(config), "--json"]
    both = [
        subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    first, second = (json.loads(out) for out, _ in printed)
    assert first == second and first["out"] == 400


# ------------------------------------------------------------------------------------------------ bad input

REFUSED = [
    # configuration, exit code, what is said
    ({"source": {"kind": "csv", "path": "HERE/x.csv", "image": "picture"}}, 64, "source.image='picture': not a column"),
    ({"source": {"kind": "csv", "path": "HERE/x.csv"}, "filters": {"low": "scor > 1"}}, 64, "'scor' is not a column"),
    ({"source": {"kind": "csv", "path": "HERE/gone.csv"}}, 74, "gone.csv: not found"),
    ({"source": {"kind": "parquet", "path": "HERE/x.csv"}}, 74, "not a valid parquet file"),
    ({"source": {"kind": "tars", "path": "HERE/cut.tar"}}, 74, "cut.tar: ends at byte"),
    ({"source": {"kind": "folder", "path": "HERE/bad"}}, 74, "all 2 rows were rejected (empty_file 1, not_an_image 1)"),
    ({"source": {"kind": "scenes", "count": 1}, "ray_address": "127.0.0.1:1"}, 70, "ray_address=127.0.0.1:1"),
    ({"source": {"kind": "scenes", "count": 1}, "ray_address": "ray"}, 64, "ray_address=ray: use HOST"),
    ({"source": {"kind": "scenes", "count": 1}, "output": "HERE/x.csv/out"}, 74, "x.csv/out"),
    (
        {"source": {"kind": "scenes", "count": 1}, "output": "s3://no-such-bucket/out"},
        74,
        "no-such-bucket/out/build.json: no such",
    ),
]


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(("tree", "code", "said"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_cannot_be_built_is_one_clear_line_and_its_exit_code(tmp_path, monkeypatch, capsys, tree, code, said):
    (tmp_path / "x.csv").write_text("image,caption,score\nhttp://h/x,a,1\n")
    (tmp_path / "bad").mkdir()
    for name, data in {"a.jpg": b"", "a.txt": b"a", "b.jpg": b"<html>", "b.txt": b"b"}.items():
        (tmp_path / "bad" / name).write_bytes(data)
    cut_tar(tmp_path / "cut.tar")
    text = json.dumps({"output": "HERE/out", **tree}).replace("HERE", str(tmp_path))
    (tmp_path / "build.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["tessera", "data", "build", str(tmp_path / "build.yaml"), "--json"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    printed = capsys.readouterr()
    assert (leaving.value.code, printed.out) == (code, "")
    assert printed.err.startswith("error: ") and said in printed.err
    assert not (tmp_path / "out/manifest.json").exists()


def cut_tar(path):
    """Two samples, cut between the first and the second."""
    with tarfile.open(path, "w") as tar:
        for name in ("0.png", "0.txt", "1.png", "1.txt"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"1.png")])
