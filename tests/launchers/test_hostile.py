"""Text of a configuration stays text in every rendered job: hostile values of every field, and what then runs.

A Slurm script runs in bash beside tools that record their arguments; its #SBATCH lines are read as sbatch reads them.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from launchers import slurm
from launchers.kubernetes.objects import objects
from launchers.kubernetes.submit import render
from launchers.local import Group, check_rendezvous, dry_run_text
from launchers.quoting import comment, directive, kubelet, quoted
from launchers.spec import KubernetesCluster, SlurmCluster, Task, describe
from tests.launchers.kubernetes.pods import expanded

RECIPE, BUILD = "configs/clip/vit-b-32.yaml", "configs/data/folder.yaml"
MARK = "owned"
HOSTILE = (
    "with space", f"$(touch {MARK})", f"`touch {MARK}`", f'"; touch {MARK}; "', f"'; touch {MARK}; '", "$HOME", "./~",
    "*", "{folder}", "{{}}", "a\\b", "\\", '"', "'", "#x", "a #b", "-n", "--help", "!!", "é图🙂", f"&& touch {MARK} #",
)  # fmt: skip
BROKEN = (f"x\ntouch {MARK}", f"x\n#SBATCH --nodelist={MARK}", f"x\r\ntouch {MARK}\r", "x\n\n\n\ny", "a\tb", "a\u2028b")
"""With line breaks and control characters."""
SHELL_CODE = "setup"
DIRECTIVES = {"account": "account", "partition": "partition", "qos": "qos", "constraint": "constraint", "gres": "gres",
              "memory": "mem", "output": "output"}  # fmt: skip
WORDS = ("python", "container_image")
RECORD = """#!{python}
import json, os, sys
with open({file!r}, "a") as file:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=file)
sys.exit({code})
"""


@pytest.fixture(autouse=True)
def _in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@dataclass(frozen=True)
class Ran:
    """What a script did: the arguments and the environment of its srun, and the folder that it ran in."""

    words: list[str]
    env: dict[str, str]


def run(script: str, folder: Path) -> Ran:
    """Run a batch script beside recording tools. Fails where anything else was executed."""
    tools, work, log = folder / "bin", folder / "work", folder / "log"
    for made in (tools, work):
        made.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    for name in ("srun", "scontrol", "squeue"):
        text = RECORD.format(python=sys.executable, file=str(log if name == "srun" else folder / "other"), code=0)
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}
    env = {**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=script.encode(), cwd=work, env=env, timeout=60, capture_output=True)
    assert not list(folder.rglob(MARK)), "a value was executed"
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    [line] = log.read_text().splitlines()
    return Ran(*json.loads(line))


def sbatch_reads(script: str) -> Iterator[tuple[str, str | None]]:
    """Name and value of the options in a script, as `_get_argument` of Slurm's sbatch/opt.c reads them."""
    for line in script.split("\n"):
        if not line.startswith("#"):
            return
        if line.startswith("#SBATCH"):
            [word] = sbatch_words(line.removeprefix("#SBATCH"))
            name, equals, value = word.partition("=")
            yield name, value if equals else None


def sbatch_words(line: str) -> list[str]:
    """Split a line: white space separates, quotation marks join, a backslash takes the next letter, # is a comment."""
    words: list[str] = []
    word, quote, escaped, inside = "", "", False, False
    for letter in line + " ":
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = inside = True
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter in "\"'":
            quote, inside = letter, True
        elif letter == "#":
            break
        elif letter.isspace():
            words, word, inside = [*words, word] if inside else words, "", False
        else:
            word, inside = word + letter, True
    return words


CONFIGURATION = """\
ClusterName=none
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=1
MessageTimeout=1
AuthType=auth/none
CredType=cred/none
NodeName=n
PartitionName=p Nodes=n
"""
"""Of a Slurm that does not answer: sbatch reads a script before it asks."""


@pytest.mark.real
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm's sbatch")
def test_sbatch_itself_reads_every_value_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text(CONFIGURATION)
    lines = [directive("comment", f"<{value}>") for value in HOSTILE]
    (tmp_path / "script").write_text("\n".join(["#!/bin/bash", *lines, ""]))
    env = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    done = subprocess.run(["sbatch", "-vvv", str(tmp_path / "script")], env=env, capture_output=True, timeout=60)
    told = re.findall(r'Found in script, argument "--comment=<(.*)>"', done.stderr.decode())
    assert told == list(HOSTILE), done.stderr.decode()


def site(**changes: Any) -> SlurmCluster:
    return check_settings(SlurmCluster, {"procs_per_node": 1} | changes, "site")


def script(cluster: SlurmCluster, *overrides: str, seeds: str = "") -> str:
    return slurm.render(describe(RECIPE, overrides, cluster), cluster, seeds)


def text_fields(schema: type[SlurmCluster]) -> set[str]:
    """Fields that hold any text, in whatever container."""
    return {name for name, field in schema.model_fields.items() if field.annotation in (str, tuple[str, ...])} | {"env"}


# ------------------------------------------------------------------------------------------------------ Slurm


def test_every_text_field_of_a_site_is_tried_here() -> None:
    tried = {*DIRECTIVES, *WORDS, "container_mounts", "options", "env"}
    assert text_fields(SlurmCluster) - {SHELL_CODE, "time_limit"} == tried  # a limit has a fixed form


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_site_is_given_to_sbatch_and_srun_as_it_is_written(value: str, tmp_path: Path) -> None:
    text = script(
        site(
            **dict.fromkeys(DIRECTIVES, value), options=[f"--comment={value}", f"reservation={value}"],
            env={"A": value}, python=value, container="apptainer", container_image=value, container_mounts=[value],
        ),
        f"tracking.experiment={value}",
    )  # fmt: skip
    read = dict(sbatch_reads(text))
    assert {name: read[f"--{name}"] for name in DIRECTIVES.values()} == dict.fromkeys(DIRECTIVES.values(), value)
    assert read["--comment"] == read["--reservation"] == value and len(read) == 17
    ran = run(text, tmp_path)
    at = ran.words.index("apptainer")
    program = ["-m", "launchers.cli", "train", RECIPE, f"tracking.experiment={value}"]
    assert ran.words[at:] == ["apptainer", "exec", "--nv", "--bind", value, value, value, *program]
    assert ran.env["A"] == value


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_container_of_pyxis_is_one_word(value: str, tmp_path: Path) -> None:
    ran = run(script(site(container="pyxis", container_image=value, container_mounts=[value, "/a:/b"])), tmp_path)
    assert f"--container-image={value}" in ran.words and f"--container-mounts={value},/a:/b" in ran.words
    assert f"--container-workdir={tmp_path / 'work'}" in ran.words


@pytest.mark.parametrize("value", (*HOSTILE, *BROKEN))
def test_a_hostile_override_reaches_the_program_as_it_is_written(value: str, tmp_path: Path) -> None:
    words = [f"run=runs/{value}", f"train.checkpoints=out/{value}", f"tracking.experiment={value}"]
    assert run(script(site(), *words), tmp_path).words[-3:] == words
    assert (tmp_path / "work/runs" / value / "job.end").is_file()


@pytest.mark.parametrize("value", (*HOSTILE, *BROKEN))
def test_only_the_number_of_a_seed_is_filled_in_in_an_array(value: str, tmp_path: Path) -> None:
    text = script(site(), f"run=runs/{value}", f"train.checkpoints=s3://b/{value}$SLURM_ARRAY_TASK_ID", seeds="0-3")
    told = ["seed=3", f"run=runs/{value}/seed-3", f"train.checkpoints=s3://b/{value}$SLURM_ARRAY_TASK_ID/seed-3"]
    assert run(text, tmp_path).words[-3:] == told


@pytest.mark.parametrize("value", (*HOSTILE, *BROKEN))
@pytest.mark.parametrize(("task", "options"), [("encode", "--image-tokenizer"), ("generate", "--prompt")])
def test_hostile_targets_and_options_reach_the_program_as_they_are_written(
    task: Task, options: str, value: str, tmp_path: Path
) -> None:
    cluster = site(nodes=2)
    text = slurm.render(describe(value, [options, value], cluster, task=task), cluster)
    words = run(text, tmp_path).words
    at = words.index(task)
    assert words[at : at + 4] == [task, value, options, value]
    assert task == "generate" or words[-1] == "--ray-address=node1:20007" or words[-1].startswith("--ray-address=:")


@pytest.mark.parametrize("field", [*DIRECTIVES, "options"])
@pytest.mark.parametrize("value", [*BROKEN, "a\0b"])
def test_what_no_line_of_sbatch_can_hold_is_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match="control character|zero byte"):
        script(site(**{field: [f"comment={value}"] if field == "options" else value}))


@pytest.mark.parametrize("name", ["A=1; touch owned #", "A\n", "1A", "", "A B", "$(x)", "Ä"])
def test_a_variable_has_the_name_of_a_variable(name: str) -> None:
    with pytest.raises(ConfigError, match="env"):
        site(env={name: "x"})


@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("--reservation=x", [("--reservation", "x")]),
        ("reservation x", [("--reservation", "x")]),
        ("exclusive", [("--exclusive", None)]),
        ("--comment=", [("--comment", "")]),
        ("--comment=a b", [("--comment", "a b")]),
    ],
)
def test_an_option_is_written_with_or_without_its_dashes(option: str, read: list[tuple[str, str | None]]) -> None:
    assert list(sbatch_reads(script(site(options=[option]))))[-1:] == read


def test_an_option_of_one_letter_keeps_its_one_dash() -> None:
    assert "\n#SBATCH -C gpu\n" in script(site(options=["-C gpu"]))


@pytest.mark.parametrize("option", ["", "--", "=x", "; touch owned", "2", "$(x)"])
def test_an_option_that_is_none_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="is not an option of sbatch"):
        script(site(options=[option]))


@pytest.mark.parametrize(
    "seeds",
    ["$(touch owned)", "1\n2", "²", "٣", "0-99999999999", "-1", "1;2", " 1", "9" * 5000, "0" * 5000, "0-" + "9" * 5000],
)
def test_seeds_are_numbers(seeds: str) -> None:
    with pytest.raises(ConfigError, match="neither a number"):
        script(site(), seeds=seeds)


def test_an_empty_array_of_seeds_is_refused() -> None:
    given_empty = ["launch", "slurm", "configs/demo/clip.yaml", "--dry-run", "--seeds", ""]
    done = subprocess.run([sys.executable, "-m", "launchers.cli", *given_empty], capture_output=True, text=True)
    assert done.returncode == 64 and "--seeds is empty" in done.stderr and not done.stdout


@pytest.mark.parametrize("address", ["", " ", "a b", "host\n", "host\0", "\ud800"])
def test_an_address_of_node_0_is_one_word(address: str) -> None:
    with pytest.raises(ConfigError, match="--master-addr .* is not a host name or address"):
        check_rendezvous(1, 0, address, 0)


# ------------------------------------------------------------------------------- Kubernetes, this machine, any text


def commands(trees: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The containers anywhere in a tree."""
    for value in trees:
        if isinstance(value, Mapping):
            yield from [value] if "image" in value else []
            yield from commands(list(value.values()))
        elif isinstance(value, list):
            yield from commands(value)


@pytest.mark.parametrize("value", [*HOSTILE, *BROKEN, "$(SECRET)", "$$(SECRET)", "$(JOB_COMPLETION_INDEX)", "a$"])
def test_a_kubelet_hands_on_what_was_written(value: str) -> None:
    cluster = check_settings(
        KubernetesCluster, {"image": "e.com/t:1", "claims": {"all": "/work"}, "env": {"A": value}}, "place"
    )
    known = {"SECRET": "s", "JOB_COMPLETION_INDEX": "0"}
    spec = describe("runs/gpt", ["--prompt", value], cluster, task="generate")
    assert list(yaml.safe_load_all(render(spec, cluster))) == objects(spec, cluster)
    [container] = commands(objects(spec, cluster))
    assert [expanded(word, known) for word in container["command"][-2:]] == ["--prompt", value]
    assert expanded({entry["name"]: entry["value"] for entry in container["env"]}["A"], known) == value


@pytest.mark.parametrize("value", [*HOSTILE, *BROKEN, "$(SECRET)", "$$x"])
def test_the_entrypoint_of_a_ray_job_keeps_its_words(value: str) -> None:
    cluster = check_settings(KubernetesCluster, {"image": "e.com/t:1", "claims": {"all": "/work"}, "nodes": 2}, "place")
    job = objects(describe("data/mine", ["--image-tokenizer", value], cluster, task="encode"), cluster)[-1]
    words = shlex.split(expanded(job["spec"]["entrypoint"], {"SECRET": "s"}))
    assert words[words.index("--image-tokenizer") + 1] == value


@pytest.mark.parametrize("value", [*HOSTILE, *BROKEN])
def test_a_dry_run_on_this_machine_keeps_its_words(value: str) -> None:
    text = dry_run_text(Group(("printf", "%s|", value), 1, 1, master_port=1, env=(("A", value),)))
    done = subprocess.run(["bash"], input=text.encode(), capture_output=True, timeout=30)
    assert done.stdout.decode() == f"{value}|"


LETTERS = st.text(st.sampled_from("ab \t\n\r'\"\\$`(){}[]<>|&;#!*?~%=-:,.é图\u2028\x85\x1b"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(LETTERS, min_size=4, max_size=4))
def test_any_text_is_one_word_to_bash(texts: list[str]) -> None:
    line = " ".join(quoted(text) for text in texts)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, timeout=30)
    assert done.stdout.decode().split("\0")[:-1] == texts


@settings(max_examples=300, deadline=None)
@given(text=LETTERS)
def test_any_text_is_one_line_or_one_value(text: str) -> None:
    assert len((comment(text) + "x").splitlines()) == 1
    assert expanded(kubelet(text), {"a": "expanded", "": "expanded"}) == text
    try:
        line = directive("comment", text)
    except ConfigError:
        assert not text.isprintable()
        return
    assert list(sbatch_reads(line)) == [("--comment", text)]


@pytest.mark.parametrize("text", ["a\0b", "\udcff"])
def test_what_no_command_line_can_hold_is_refused(text: str) -> None:
    for put in (quoted, kubelet, lambda value: directive("comment", value)):
        with pytest.raises(ConfigError, match=r"zero byte or is not UTF-8"):
            put(text)
