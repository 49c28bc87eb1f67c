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
RAY_AT_MODULE_LEVEL = {
    "actors/group.py",
    "orchestrator/cluster/ray_cluster.py",
    "orchestrator/cluster/ray_connection.py",
}
PURE = (  # of the orchestrator: neither Ray nor transformers
    "orchestrator/config",
    "orchestrator/losses",
    "orchestrator/methods",
    "orchestrator/credit/advantages.py",
    "orchestrator/credit/returns.py",
    "orchestrator/pipeline",
    "orchestrator/batches/regrouping.py",
    "orchestrator/batches/row_table.py",
    "orchestrator/executor.py",
    "orchestrator/batches/batch_stages.py",
    "orchestrator/planning",
    "orchestrator/collection/staleness.py",
    "orchestrator/cluster/fleet.py",
    "orchestrator/cluster/failures.py",
)
TORCHLESS = (  # or by `actors.imports.torch`, once it is used
    "orchestrator/config",
    "orchestrator/losses",
    "orchestrator/methods",
    "orchestrator/credit",
    "orchestrator/pipeline",
    "orchestrator/planning/plan.py",
    "orchestrator/planning/role_processes.py",
    "orchestrator/collection/staleness.py",
    "orchestrator/cluster/fleet.py",
    "orchestrator/cluster/failures.py",
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


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """All of a file."""
    return tuple(ast.walk(tree(file)))


@cache
def calls(file: Path) -> tuple[tuple[str, ast.Call], ...]:
    """What is called, as it is written, and the whole call."""
    return tuple((ast.unparse(node.func), node) for node in nodes(file) if isinstance(node, ast.Call))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def imports(file: Path) -> tuple[Import, ...]:
    """Every import of a file that happens when it runs; those for the type checker alone do not."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[Import]:
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


def test_pure_modules_import_neither_ray_nor_transformers():
    assert [place for place in PURE if not (ROOT / place).exists()] == []
    wrong = [
        str(found)
        for file in sources(*PURE)
        for found in imports(file)
        if found.package in ("ray", "transformers", "vllm", "deepspeed")
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_listed_as_torchless_do_not_import_torch():
    assert [place for place in TORCHLESS if not (ROOT / place).exists()] == []
    wrong = [str(found) for file in sources(*TORCHLESS) for found in imports(file) if found.package == "torch"]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_import_cycle():
    """Not at module level, nor inside functions or for the type checker alone: who imports whom is a drawing that one
    can read from top to bottom."""
    modules = {name: set(imported(file)) for name, file in module_files().items()}
    assert circles(modules) == []


def test_an_import_cycle_is_found_wherever_it_is():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"], ["d"]]


@cache
def module_files() -> dict[str, Path]:
    return {
        name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
        for file in sources(*PACKAGES)
    }


def imported(file: Path) -> Iterator[str]:
    """Our own modules that a file names in any import: a module, or what one holds."""
    files = module_files()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from (name for name in (whole if whole in files else node.module,) if name in files)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, by whichever way."""
    reached = {name: graph[name] | {name} if name in graph[name] else set(graph[name]) for name in graph}
    growing = True
    while growing:
        more = {name: found.union(*(reached[other] for other in found)) for name, found in reached.items()}
        growing, reached = more != reached, more
    in_one = {
        name: frozenset(o for o in found if name in reached[o]) for name, found in reached.items() if name in found
    }
    return sorted(sorted(group) for group in set(in_one.values()))


def test_no_method_is_named_in_actors_rollout_or_rewards():
    method = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, METHODS))})(?![a-z])", re.IGNORECASE)
    wrong = [
        f"{name_of(file)}:{number}: {line.strip()}"
        for file in sources("actors", "rollout", "rewards")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if method.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_has_the_name_of_a_dependency():
    """`import vllm` inside a file called vllm.py reads as if it imported itself, and does where its folder is on the
    path. A backend's file is the exception: it is named by the word that selects it in a configuration."""
    wrong = [name_of(file) for file in sources(*PACKAGES) if file.stem.lower() in dependencies()]
    assert wrong in ([], ["actors/backends/deepspeed.py"]), "\n".join(wrong)


@cache
def dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    return {re.split(r"[^\w-]", line, maxsplit=1)[0].replace("-", "_").lower() for line in declared}


def test_no_module_has_an_uninformative_name():
    wrong = [name_of(file) for file in sources(*PACKAGES) if file.stem in SHAPELESS_NAMES]
    assert not wrong, "name it after what it guarantees:\n" + "\n".join(wrong)


def test_every_module_has_a_docstring():
    wrong = [name_of(file) for file in sources(*PACKAGES) if not ast.get_docstring(tree(file))]
    assert not wrong, "no docstring:\n" + "\n".join(wrong)


def test_no_wait_on_ray_is_without_a_deadline():
    wrong = [
        f"{name_of(file)}:{call.lineno}: {ast.unparse(call)}"
        for file in sources(*PACKAGES)
        for called, call in calls(file)
        if called in ("ray.get", "ray.wait") and "timeout" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_wait_on_a_process_or_a_url_is_without_a_deadline():
    waits = ("subprocess.run", "subprocess.check_output", "subprocess.check_call", "urllib.request.urlopen")
    wrong = [
        f"{name_of(file)}:{call.lineno}: {called}"
        for file in sources(*PACKAGES)
        for called, call in calls(file)
        if called in waits and "timeout" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not wrong, "\n".join(wrong)


def test_user_code_is_never_reached_by_putting_a_folder_on_the_path():
    """Only `imports.py` touches `sys.path`, for as long as one import takes."""
    wrong = [
        f"{name_of(file)}:{node.lineno}"
        for file in sources(*PACKAGES)
        for node in nodes(file)
        if isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node) == "sys.path"
        if name_of(file) != "orchestrator/import_pin.py"
    ]
    assert not wrong, "\n".join(wrong)
