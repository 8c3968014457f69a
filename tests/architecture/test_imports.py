"""The import rule: launchers -> pretrain -> data_pipeline, no cycles, torch and ranks only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, graph, imports, modules

LAYER = {package: height for height, package in enumerate(PACKAGES)}
LONGEST_CHAIN = 8
KNOW_RANKS = {"pretrain.mesh", "pretrain.engine", "pretrain.tracking"}
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"}
NO_TORCH = {
    "data_pipeline.config",
    "data_pipeline.errors",
    "data_pipeline.schema",
    "data_pipeline.settings",
    "data_pipeline.storage",
    "data_pipeline.stream.order",
    "data_pipeline.stream.reader",
    "data_pipeline.shards.tar",
    "data_pipeline.shards.manifest",
    "data_pipeline.shards.codes",
    "pretrain.config",
    "pretrain.sharding",
}


@pytest.fixture(scope="module")
def trees(repository: Path) -> dict[str, ast.Module]:
    return modules(repository)


def test_imports_point_down_only(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph(trees, everywhere=True).items()
        for target in targets
        if LAYER[target.partition(".")[0]] > LAYER[name.partition(".")[0]]
    ]
    assert not wrong


def test_there_is_no_import_cycle_and_no_long_chain(trees: dict[str, ast.Module]) -> None:
    edges, depth = graph(trees, everywhere=False), {}

    def measure(name: str, above: tuple[str, ...]) -> int:
        assert name not in above, f"cycle: {' -> '.join((*above, name))}"
        if name not in depth:
            depth[name] = 1 + max((measure(below, (*above, name)) for below in edges[name]), default=0)
        return depth[name]

    assert max(measure(name, ()) for name in trees) <= LONGEST_CHAIN


def test_models_and_objectives_know_no_distributed(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        if name.startswith(("pretrain.models", "pretrain.objectives"))
        for target in imports(tree, everywhere=True)
        if target.startswith(("torch.distributed", "deepspeed"))
    ]
    assert not wrong


def test_only_four_modules_know_ranks(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        if name.partition(".")[0] != "launchers" and name not in KNOW_RANKS
        for target in imports(tree, everywhere=True)
        if target.startswith(("torch.distributed", "deepspeed"))
    ]
    assert not wrong


def test_only_mesh_reads_the_process_group_from_the_environment(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name}:{node.lineno} names {node.value}"
        for name, tree in trees.items()
        if name.partition(".")[0] != "launchers" and name != "pretrain.mesh"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in RANK_VARIABLES
    ]
    assert not wrong


def test_nothing_unpickles(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        for target in imports(tree, everywhere=True)
        if target.partition(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    ]
    assert not wrong


def test_light_modules_import_without_torch_ray_or_deepspeed(trees: dict[str, ast.Module], repository: Path) -> None:
    names = sorted(name for name in trees if name in NO_TORCH or name.partition(".")[0] == "launchers")
    program = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=repository)
    assert done.returncode == 0, done.stderr


def test_every_benchmark_can_still_be_imported(repository: Path) -> None:
    names = [
        f"tests.benchmarks.{path.stem}" for path in sorted((repository / "tests" / "benchmarks").glob("bench_*.py"))
    ]
    assert names
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
