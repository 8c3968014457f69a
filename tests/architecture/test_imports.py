"""The import rule: launchers -> pretrain -> data_pipeline, no cycles, torch and ranks only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, graph, imports, modules

LAYER = {package: height for height, package in enumerate(PACKAGES)}
LONGEST_CHAIN = 13
KNOW_RANKS = {"pretrain.runtime.mesh", "pretrain.engine.engine", "pretrain.tracking"}
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
    "data_pipeline.text.config",
    "data_pipeline.text.kinds",
    "pretrain.config",
    "pretrain.engine.sharding",
}
MAY_IMPORT_TORCH = {"launchers.plan.device", "launchers.plan.trace"}
"""What `tessera plan` alone imports, when it plans."""


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
    edges, chains = graph(trees, everywhere=False), dict[str, tuple[str, ...]]()

    def longest(name: str, above: tuple[str, ...]) -> tuple[str, ...]:
        assert name not in above, f"cycle: {' -> '.join((*above, name))}"
        if name not in chains:
            below = max((longest(below, (*above, name)) for below in edges[name]), key=len, default=())
            chains[name] = (name, *below)
        return chains[name]

    chain = max((longest(name, ()) for name in trees), key=len)
    assert len(chain) <= LONGEST_CHAIN, f"{len(chain)} files import one another in a row: {' -> '.join(chain)}"


def test_models_and_tasks_know_no_distributed(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        if name.startswith(("pretrain.models", "pretrain.tasks", "pretrain.inputs", "pretrain.schema"))
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
        if name.partition(".")[0] != "launchers" and name != "pretrain.runtime.mesh"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in RANK_VARIABLES
    ]
    assert not wrong


def test_what_reads_shards_and_trains_imports_nothing_that_makes_them(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph(trees, everywhere=True).items()
        for target in targets
        if target.startswith("data_pipeline.ingest") and name.startswith(("pretrain", "data_pipeline.stream"))
    ]
    assert not wrong


FLOORS = (
    ("schema",), ("config", "models", "runtime", "interchange", "inputs"), ("engine", "tasks"),
    ("checkpoint", "tracking"), ("generate",), ("evaluations",), ("train", "evaluate"),
)  # fmt: skip
"""The rooms and files of pretrain, from the ground up: an import never goes to a higher floor."""


def test_no_import_of_pretrain_goes_up_a_floor(trees: dict[str, ast.Module]) -> None:
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph(trees, everywhere=False).items()
        for target in targets
        if name.startswith("pretrain.") and target.startswith("pretrain.")
        and height[target.split(".")[1]] > height[name.split(".")[1]]
    ]  # fmt: skip
    assert not wrong


def test_a_class_has_a_name_of_its_own(trees: dict[str, ast.Module]) -> None:
    classes = [node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {name for name in classes if classes.count(name) > 1} == set()


def _is_kind(side: ast.expr) -> bool:
    """Is it the `kind` of a model or a task?"""
    owner = side.value if isinstance(side, ast.Attribute) and side.attr == "kind" else None
    name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
    return name in ("model", "task", "config", "tokenizer")


def test_the_trunk_asks_for_no_kind_of_model_or_task(trees: dict[str, ast.Module]) -> None:
    """A family is told apart by what its schema and its task say; the tables alone know the kinds by name."""
    trunk = ("train", "evaluate", "generate", "config", "tracking", "inputs", "runtime", "engine", "checkpoint")
    prefixes = tuple(f"pretrain.{room}" for room in trunk) + ("launchers.plan",)
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        if name.startswith(prefixes)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and any(_is_kind(side) for side in (node.left, *node.comparators))
    ]
    assert not wrong


SPECIAL_IDS = {f"{name}{end}" for name in ("pad", "unk", "cls", "sep", "mask") for end in ("", "_id", "_token_id")}
TOKEN_IDS = {"tokens", "labels", "ids", "text", "token", "pieces"}


def _special_ids_in(tree: ast.Module) -> list[int]:
    """Lines that give a special token a constant id, or compare ids of a text with a constant."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = {part.id.lower() for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            lines += [node.lineno] * bool(named & SPECIAL_IDS and _is_literal(node.value))
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = {getattr(side, "id", getattr(side, "attr", "")) for side in sides}
            lines += [node.lineno] * bool(named & TOKEN_IDS and any(_is_literal(side) for side in sides))
    return lines


def _is_literal(value: ast.expr) -> bool:
    """Whether it is an integer, a tuple of integers or a range."""
    if isinstance(value, ast.Tuple | ast.List):
        return all(map(_is_literal, value.elts))
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "range"
    return isinstance(value, ast.Constant) and type(value.value) is int


def test_only_the_kinds_of_text_tokenizers_know_special_ids(trees: dict[str, ast.Module]) -> None:
    """Every kind has ids of its own: BERT's [PAD] is 0 and its [CLS] 101, RoBERTa's <pad> is 1 and its <s> 0."""
    fixed = {"data_pipeline.text.config.SPECIALS", "data_pipeline.text.sentencepiece.SentencePieceTokenizer"}
    outside = {name: tree for name, tree in trees.items() if not name.startswith("data_pipeline.text.")}
    wrong = [f"{name} imports {target}" for name, tree in outside.items() for target in fixed & {*imports(tree, True)}]
    readers = {name: tree for name, tree in outside.items() if not name.startswith("data_pipeline.")}
    wrong += [f"{name}:{line}" for name, tree in readers.items() for line in _special_ids_in(tree)]
    assert not wrong


@pytest.mark.parametrize(
    "line", ["PAD = 0", "pad, unk, cls, sep, mask = range(5)", "pad_id: int = 0", "found = (tokens >= 5) | (x == 1)"]
)
def test_a_constant_special_id_is_found(line: str) -> None:
    assert _special_ids_in(ast.parse(line)) == [1]


def test_nothing_unpickles(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        for target in imports(tree, everywhere=True)
        if target.partition(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    ]
    assert not wrong


def test_light_modules_import_without_torch_ray_or_deepspeed(trees: dict[str, ast.Module], repository: Path) -> None:
    launchers = {name for name in trees if name.partition(".")[0] == "launchers"} - MAY_IMPORT_TORCH
    schema = {name for name in trees if name.startswith("pretrain.schema")}
    names = sorted(launchers | schema | (NO_TORCH & trees.keys()))
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
