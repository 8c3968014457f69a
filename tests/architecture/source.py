"""The source tree as the architecture tests see it: modules and what each imports, read without running them."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("data_pipeline", "pretrain", "launchers")


def modules(repository: Path) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree, of every file in the packages."""
    trees = {}
    for package in PACKAGES:
        for path in sorted((repository / package).rglob("*.py")):
            parts = path.relative_to(repository).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


def imports(tree: ast.Module, everywhere: bool) -> Iterator[str]:
    """Dotted names imported at module level, or (`everywhere`) also inside functions."""
    nodes = ast.walk(tree) if everywhere else _module_level(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from _module_level(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _module_level(node.body + [line for handler in node.handlers for line in handler.body])


def graph(trees: dict[str, ast.Module], everywhere: bool) -> dict[str, set[str]]:
    """Module -> the project's modules that it imports."""
    return {
        name: {found for target in imports(tree, everywhere) if (found := _module_of(target, trees)) and found != name}
        for name, tree in trees.items()
    }


def _module_of(target: str, trees: dict[str, ast.Module]) -> str | None:
    while target and target not in trees:
        target = target.rpartition(".")[0]
    return target or None
