"""The command line as a user meets it: help, errors, exit codes, and what may not be imported for it."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

from data_pipeline.errors import ConfigError, DataError, NodeFault, Requeue, TesseraError
from launchers import cli
from launchers.arguments import emit
from launchers.watch import write_record

RECIPE = "configs/text/bert-base.yaml"
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'deepspeed', 'ray', 'mlflow', 'transformers'):
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocker())
from launchers.cli import main
sys.argv = ['tessera', *sys.argv[1:]]
main()
"""


def commands(app: typer.Typer, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command of the table, as words."""
    own = [(*before, str(command.name)) for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        own += commands(group.typer_instance, (*before, str(group.name)))
    return own


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line in this process -> its exit code."""
    monkeypatch.setattr(sys, "argv", ["tessera", *words])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return int(leaving.value.code or 0)


def call_without_torch(*words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", BLOCKER, *words], capture_output=True, text=True, timeout=60, env=env)


@pytest.fixture(autouse=True)
def _in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@pytest.mark.parametrize("words", commands(cli.app), ids=" ".join)
def test_every_command_explains_itself(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words, "--help") == 0
    assert "Usage: tessera " + " ".join(words) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["data", "build", "--help"],
        ["train", "--help"],
        ["launch", "local", RECIPE, "--dry-run"],
        ["launch", "slurm", RECIPE, "--dry-run"],
        ["launch", "kubernetes", RECIPE, "--dry-run"],
    ],
    ids=" ".join,
)
def test_help_and_dry_run_need_no_torch(words: list[str]) -> None:
    done = call_without_torch(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_version_is_told_without_torch() -> None:
    done = call_without_torch("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tessera {version('tessera')}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", RECIPE, "trian.steps=4"], "did you mean 'train'?"),
        (["train", RECIPE, "optim.lrr=4"], "did you mean 'lr'?"),
        (["train", RECIPE, "optim.lr"], "write key=value"),
        (["train", "nowhere.yaml"], "no such configuration file"),
        (["launch", "local", RECIPE, "--procs-per-node", "3"], "global_batch=256 is not divisible by 3 ranks"),
        (["launch", "local", RECIPE, "--nodes", "2"], "--master-addr"),
        (["launch", "local", RECIPE, "--node-rank", "1"], "is outside of 0.."),
        (["launch", "slurm", RECIPE, "--procs-per-node", "16"], "more than gpus_per_node=8"),
        (["status", "runs/nowhere"], "use the folder in `run:`"),
        (["stop", "runs/nowhere"], "no launcher of this run is running"),
        (["data", "bild"], "No such command"),
        (["train"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_one_clear_line_and_exit_code_64(words: list[str], said: str) -> None:
    done = call_without_torch(*words)
    assert done.returncode == 64
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def numbers_of(words: tuple[str, ...]) -> list[tuple[str, type]]:
    """The options of a command that take a number: the option, and int or float."""
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    assert command.callback is not None
    hints = get_type_hints(command.callback).items()
    kinds = {name: set(get_args(hint) or (hint,)) & {int, float} for name, hint in hints}
    return [(parameter.opts[-1], kind) for parameter in command.params for kind in kinds.get(str(parameter.name), ())]


NUMBERS = [(words, option, kind) for words in commands(cli.app) for option, kind in numbers_of(words)]
POSITIVE = {
    "--step", "--count", "--lines", "--candidates", "--kills", "--nodes", "--procs-per-node", "--gpus-per-node",
    "--workers", "--sample", "--crops", "--timeout", "--timeout-s", "--network-gbits",
}  # fmt: skip
ASKED = {
    "generate": ["--prompt=x"], "data encode": ["--image-tokenizer=x"],
    "checkpoint export": ["out"], "checkpoint name": ["best"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "option", "kind"),
    NUMBERS,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else getattr(value, "__name__", value),
)
def test_a_number_that_cannot_be_is_refused_by_the_command_line(
    words: tuple[str, ...], option: str, kind: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    high = {"--master-port": ["65536"], "--crops": ["11"], "--seed": [str(2**64)]}.get(option, [])
    zero = ["0"] if option in POSITIVE and words != ("data", "order") else []
    for value in ["-1", *zero, *high, *(["nan", "inf", "-inf"] if kind is float else ["1.5", "many"])]:
        more = ASKED.get(" ".join(words), [])
        assert call(monkeypatch, *words, "x", *more, f"{option}={value}") == 64, value
        said = capsys.readouterr().err
        assert option in said and "Invalid value" in said, value


def test_numbers_of_every_command_are_looked_at() -> None:
    assert len(NUMBERS) > 30 and {option for _, option, _ in NUMBERS} >= POSITIVE


@pytest.mark.parametrize("made", [False, True], ids=["no folder", "no run"])
@pytest.mark.parametrize(
    "words", [["list"], ["gc"], ["verify"], ["name", "best"], ["export", "out"]], ids=lambda w: w[0]
)
def test_checkpoints_of_what_is_no_run_are_a_clear_error(
    words: list[str], made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "nowhere"
    if made:
        run.mkdir()
    verb, *rest = words
    assert call(monkeypatch, "checkpoint", verb, str(run), *rest) == 64
    said = capsys.readouterr().err
    assert str(run) in said and "use the folder in `run:` of a configuration" in said
    assert ("is not a run" if made else "is not a folder") in said and run.exists() == made


@pytest.mark.parametrize("error", [ConfigError, DataError, NodeFault, Requeue])
def test_every_error_for_the_user_has_its_exit_code(
    error: type[TesseraError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("[value] rule; remedy")

    monkeypatch.setattr(cli, "app", fail)
    assert call(monkeypatch) == error.exit_code
    prefix = "" if error is Requeue else "error: "
    assert capsys.readouterr().err == f"{prefix}[value] rule; remedy\n"


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


ENDING = """
import datetime, sys, threading
import torch.distributed as dist
import pretrain.train
from data_pipeline import errors
from launchers import cli

def trained(config, changes=()):
    store = dist.TCPStore('127.0.0.1', 0, 1, True, datetime.timedelta(seconds=30), wait_for_workers=False)
    store.set('key', '')
    def talk():
        while True:
            store.multi_get(['key'])
    for _ in range(3):
        threading.Thread(target=talk, daemon=True).start()
    if how == 'Requeue':
        raise errors.Requeue('saved')

how = sys.argv.pop()
pretrain.train.main = trained
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("done", 0), ("Requeue", 75)])
def test_a_training_process_leaves_with_its_code_whatever_its_threads_are_doing(how: str, code: int) -> None:
    """At the interpreter's orderly end a thread that comes back from a call of torch's aborts the process."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING, "train", RECIPE, how], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    assert "terminate called" not in done.stderr and ("saved" in done.stderr) == (how == "Requeue")


@pytest.mark.parametrize(
    ("command", "where", "said"),
    [
        (["evaluate", "RUN"], "pretrain.evaluate.load_trained", "RUN/evaluation.json was not written"),
        (["evaluate", "RUN", "--json"], "pretrain.evaluate.load_trained", "RUN/evaluation.json was not written"),
        (
            ["generate", "RUN", "--prompt", "x"],
            "pretrain.generate.load_trained",
            "only the images with printed paths are written",
        ),
        (["checkpoint", "export", "RUN", "OUT"], "pretrain.checkpoint.verbs.load_weights", "OUT was not written"),
        (
            ["checkpoint", "import", "RUN", "OUT", "--format", "x"],
            "pretrain.checkpoint.verbs.read_layout",
            "OUT was not",
        ),
        (["plan", RECIPE], "launchers.plan.make.make_plan", "files are written atomically"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_an_interrupt_leaves_with_130_and_says_what_is_written(
    command: list[str], where: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    monkeypatch.setattr("pretrain.checkpoint.verbs._settings_of", lambda *_: None)
    named = {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}
    before = signal.getsignal(signal.SIGINT)
    try:
        assert call(monkeypatch, *[named.get(word, word) for word in command]) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a second one may meet the interpreter's end
    finally:
        signal.signal(signal.SIGINT, before)
    told = capsys.readouterr().err
    for name, path in named.items():
        said = said.replace(name, path)
    assert told.startswith("interrupted") and said in told and told.count("\n") == 1


LOGGED = [(9, 2.0), (10, 1.5)]  # step, loss; each took half a second and ended a second after the one before


def test_status_and_logs_read_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path, {"pid": 1, "start_ticks": -1, "host": "elsewhere", "attempt": 2, "exit_code": 75})
    (tmp_path / "config.json").write_text('{"train": {"steps": 40}}')
    lines = [
        {"step": step, "attempt": 2, "time_ms": 1000 * step, "step_s": 0.5, "stepped_s": 0.5 * at, "loss": loss}
        for at, (step, loss) in enumerate(LOGGED, 1)
    ]
    (tmp_path / "attempts.jsonl").write_text('{"attempt": 2, "metrics_at": 0}\n')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "lo')
    assert call(monkeypatch, "status", str(tmp_path), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    wanted = {"state": "stopped", "step": 10, "steps": 40, "loss": 1.5, "attempt": 2, "goodput": round(1.0 / 1.5, 3)}
    assert wanted.items() <= shown.items()
    assert call(monkeypatch, "logs", str(tmp_path), "-n", "1") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 10


@pytest.mark.parametrize("config", ['{"train": {"ste', "[]", '{"train": 3}'])
def test_status_tells_the_rest_where_the_configuration_is_damaged(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path, {"pid": 1, "start_ticks": -1, "host": "elsewhere", "attempt": 2, "exit_code": 75})
    (tmp_path / "config.json").write_text(config)
    line = json.dumps({"step": 9, "attempt": 2, "time_ms": 9000, "step_s": 0.5, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert call(monkeypatch, "status", str(tmp_path), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 9 and "steps" not in shown


def test_a_table_is_a_number_of_rows_for_a_person_and_whole_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"shards": [{"name": "00000.tar"}, {"name": "00001.tar"}], "names": ["a", "b"], "samples": 7}
    emit(result, as_json=False)
    assert capsys.readouterr().out.split("\n")[:-1] == ["shards   2", "names    ['a', 'b']", "samples  7"]
    emit(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == result


SLOW_IMPORT = """
import os, signal, sys
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == 'typer':
            os.kill(os.getpid(), signal.SIGINT)
            while True:  # an interrupt is handled between two instructions of Python
                pass
sys.meta_path.insert(0, Slow())
from launchers.__main__ import main
main()
"""


def test_an_interrupt_while_modules_are_imported_leaves_with_130_and_one_line():
    ended = subprocess.run(
        [sys.executable, "-c", SLOW_IMPORT, "status", "x"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (130, "") and ended.stderr.splitlines() == [
        "interrupted: nothing was begun"
    ]
