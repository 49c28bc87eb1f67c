"""The structure of the house: who may import whom, and which words belong in which room."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from orchestrator.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("actors", "rollout", "rewards", "orchestrator", "troupe.py")
MAY_IMPORT = {  # our own packages that a package may import, itself aside
    "actors": set[str](),
    "rollout": {"actors"},
    "rewards": {"actors"},
    "orchestrator": {"actors", "rollout", "rewards"},
    "troupe.py": {"actors", "rollout", "rewards", "orchestrator"},  # the public API, which none of them imports
}
RAY_AT_MODULE_LEVEL = {"actors/group.py", "orchestrator/placement.py", "orchestrator/cli.py"}
PURE = (  # of the orchestrator: neither Ray nor transformers
    "orchestrator/losses",
    "orchestrator/advantages.py",
    "orchestrator/pipeline.py",
    "orchestrator/plan.py",
    "orchestrator/staleness.py",
    "orchestrator/fleet.py",
    "orchestrator/supervision.py",
)
TORCHLESS = (
    "orchestrator/plan.py",
    "orchestrator/staleness.py",
    "orchestrator/fleet.py",
    "orchestrator/supervision.py",
)
SHAPELESS_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    at_module_level: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources(*places: str) -> list[Path]:
    """Python files below the given packages, folders or files."""
    found = [ROOT / place for place in places]
    return sorted(file for place in found for file in ([place] if place.suffix == ".py" else place.rglob("*.py")))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file that happens when it runs; those for the type checker alone do not."""
    for node, at_module_level in running_nodes(tree(file), at_module_level=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name_of(file), node.lineno, alias.name, at_module_level)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno} is a relative import; write the whole name"
            yield Import(name_of(file), node.lineno, node.module or "", at_module_level)


def running_nodes(node: ast.AST, *, at_module_level: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        inside = at_module_level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, at_module_level
        yield from running_nodes(child, at_module_level=inside)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages_go_one_way(package: str):
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        str(found)
        for file in sources(package)
        for found in imports(file)
        if found.package in (*PACKAGES, "troupe") and found.package not in allowed
    ]
    assert not wrong, f"{package} may import {sorted(allowed)} of ours:\n" + "\n".join(wrong)


def test_nothing_that_ships_imports_the_tests():
    wrong = [str(found) for file in sources(*PACKAGES) for found in imports(file) if found.package == "tests"]
    assert not wrong, "\n".join(wrong)


def test_ray_is_imported_at_module_level_only_where_actors_are_made():
    wrong = [
        str(found)
        for file in sources(*PACKAGES)
        for found in imports(file)
        if found.package == "ray" and found.at_module_level and not may_import_ray(found.file)
    ]
    assert not wrong, "import it inside the function that needs it:\n" + "\n".join(wrong)


def may_import_ray(file: str) -> bool:
    return file in RAY_AT_MODULE_LEVEL or file.startswith("orchestrator/service/")


def test_the_mathematics_and_the_decisions_import_neither_ray_nor_transformers():
    existing = [place for place in PURE if (ROOT / place).exists()]
    wrong = [
        str(found)
        for file in sources(*existing)
        for found in imports(file)
        if found.package in ("ray", "transformers", "vllm", "deepspeed")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_decisions_do_not_import_torch():
    existing = [place for place in TORCHLESS if (ROOT / place).exists()]
    wrong = [str(found) for file in sources(*existing) for found in imports(file) if found.package == "torch"]
    assert not wrong, "\n".join(wrong)


def test_no_method_is_named_in_the_rooms_that_know_none():
    method = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, METHODS))})(?![a-z])", re.IGNORECASE)
    wrong = [
        f"{name_of(file)}:{number}: {line.strip()}"
        for file in sources("actors", "rollout", "rewards")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if method.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_bears_the_name_of_a_dependency():
    """`import vllm` inside a file called vllm.py reads as if it imported itself, and does where its folder is on the
    path. A backend's file is the exception: it is named by the word that selects it in a configuration."""
    wrong = [name_of(file) for file in sources(*PACKAGES) if file.stem.lower() in dependencies()]
    assert wrong in ([], ["actors/backends/deepspeed.py"]), "\n".join(wrong)


def dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    return {re.split(r"[^\w-]", line, maxsplit=1)[0].replace("-", "_").lower() for line in declared}


def test_no_module_has_a_name_that_says_nothing():
    wrong = [name_of(file) for file in sources(*PACKAGES) if file.stem in SHAPELESS_NAMES]
    assert not wrong, "name it after what it guarantees:\n" + "\n".join(wrong)


def test_every_module_says_what_it_is_for():
    wrong = [name_of(file) for file in sources(*PACKAGES) if not ast.get_docstring(tree(file))]
    assert not wrong, "no docstring:\n" + "\n".join(wrong)


def test_no_wait_on_ray_is_without_a_deadline():
    wrong = [
        f"{name_of(file)}:{node.lineno}: {ast.unparse(node)}"
        for file in sources(*PACKAGES)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("ray.get", "ray.wait")
        and "timeout" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_wait_on_a_process_or_a_url_is_without_a_deadline():
    waits = ("subprocess.run", "subprocess.check_output", "subprocess.check_call", "urllib.request.urlopen")
    wrong = [
        f"{name_of(file)}:{node.lineno}: {ast.unparse(node.func)}"
        for file in sources(*PACKAGES)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in waits
        and "timeout" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not wrong, "\n".join(wrong)


def test_user_code_is_never_reached_by_putting_a_folder_on_the_path():
    """Only `imports.py` touches `sys.path`, for as long as one import takes."""
    wrong = [
        f"{name_of(file)}:{node.lineno}"
        for file in sources(*PACKAGES)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
        if name_of(file) != "orchestrator/imports.py"
    ]
    assert not wrong, "\n".join(wrong)
