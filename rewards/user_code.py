"""A user's file as a module, with the modules beside it that it imports, in any process and any directory.

    driver   read(path) ──► UserCode: the text of the file, and of `helper.py` beside it if it says `import helper`
    worker   module(code) ──► the file's module; its import statements find what was carried first

It runs under private names (`_troupe_user_DIGEST`, `_troupe_user_DIGEST.helper`), and its folder never enters
`sys.path`: a file may be called anything, `rewards.py` included, and two files in two folders may each have a `helper`.
What the standard library or Troupe calls by a name keeps that name.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import linecache
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = ("actors", "rollout", "rewards", "orchestrator")
MAX_MIB = 16  # characters; the text is sent to every worker


@dataclass(frozen=True)
class File:
    """One module's text. `name`: as an import statement has it, empty for the user's file itself."""

    name: str
    path: str
    text: str
    is_package: bool = False


@dataclass(frozen=True)
class UserCode:
    """A file, first, and what it imports from beside it. Picklable."""

    files: tuple[File, ...]

    @property
    def path(self) -> str:
        return self.files[0].path

    @property
    def package(self) -> str:
        """The private name of the file's module, the same for the same text at the same place."""
        digest = blake2b(digest_size=8)
        for file in self.files:
            digest.update(f"{file.path}\n{file.text}\0".encode("utf-8", "surrogatepass"))
        return f"_troupe_user_{digest.hexdigest()}"


def read(path: Path) -> UserCode:
    """The file and the modules beside it that it imports, directly or through others. Raises OSError,
    UnicodeDecodeError, or ValueError if that is too much to carry."""
    text = path.read_text()
    files = {"": File("", str(path), text)}
    unread = list(_imported(text))
    while unread:
        name = unread.pop()
        for file in _beside(path.parent, name):
            if file.name not in files:
                files[file.name] = file
                unread += _imported(file.text)
    size_mib = sum(len(file.text) for file in files.values()) / 2**20
    if size_mib > MAX_MIB:
        raise ValueError(f"with what it imports from beside it, it has {size_mib:.0f} MiB of text; at most {MAX_MIB}")
    return UserCode(tuple(files.values()))


def module(code: UserCode) -> ModuleType:
    """The file's module, run once per process and text. Raises what running it raises."""
    _finder().know(code)
    return importlib.import_module(code.package)


def carry(texts: Iterable[Sequence[tuple[str, str, str, bool]]]) -> None:
    """From here on, import statements and pickles find these modules in this process. Each is the files of a
    `UserCode`, as plain tuples."""
    for files in texts:
        _finder().know(UserCode(tuple(File(*file) for file in files)))


def _imported(text: str) -> Iterator[str]:
    """First parts of the names that a text imports. Text that is not valid Python imports nothing here; running it
    raises the error."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (name.partition(".")[0] for name in names)


def _beside(folder: Path, name: str) -> list[File]:
    """The module `name` of a folder: a file, all files of a package, or none."""
    if name in OURS or name in sys.stdlib_module_names:
        return []
    package = folder / name
    if (package / "__init__.py").is_file():
        return [_member(folder, file) for file in sorted(package.rglob("*.py"))]
    single = folder / f"{name}.py"
    return [_member(folder, single)] if single.is_file() else []


def _member(folder: Path, file: Path) -> File:
    parts = file.relative_to(folder).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return File(".".join(parts[:-1] if is_package else parts), str(file), file.read_text(), is_package)


class _Finder(MetaPathFinder, Loader):
    """Finds and loads the modules of carried code by their private names."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[File, UserCode]] = {}

    def know(self, code: UserCode) -> None:
        for file in code.files:
            self._known[f"{code.package}.{file.name}".rstrip(".")] = (file, code)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._known:
            return None
        file, _ = self._known[fullname]
        is_package = file.is_package or not file.name  # the user's file acts as the package of the modules beside it
        return ModuleSpec(fullname, self, origin=file.path, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        file, code = self._known[module.__name__]
        lines = file.text.splitlines(keepends=True)
        linecache.cache[file.path] = (len(file.text), None, lines, file.path)  # for tracebacks
        module.__file__ = file.path
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importer(code)}
        exec(compile(file.text, file.path, "exec"), module.__dict__)


def _finder() -> _Finder:
    """The finder of this process, installed when it is first needed."""
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            return finder
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    return finder


def _importer(code: UserCode) -> Any:
    """`__import__` for carried code: what was carried with it, under its private name, before what is installed."""
    carried = {file.name.partition(".")[0] for file in code.files} - {""}

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        first = name.partition(".")[0]
        if level or first not in carried:
            return builtins.__import__(name, globals, locals, fromlist, level)
        leaf = builtins.__import__(f"{code.package}.{name}", globals, locals, fromlist or ("__name__",), 0)
        return leaf if fromlist else sys.modules[f"{code.package}.{first}"]

    return import_
