"""Where rows come from: hub, file, folder, mixture or example. All become one table with our column names.

JSON lines are read here and not by `datasets`, so that a broken line or broken UTF-8 is a bad row with its line number
instead of the end of the run.
"""

# pyright: basic
# (datasets and pyarrow are typed in part only)

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.errors import DataError
from orchestrator import examples
from orchestrator.config import DataConfig, MixtureEntry
from orchestrator.data.formats import renamed
from orchestrator.data.report import BadRows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
JSON_SUFFIXES = (".jsonl", ".json")
SUFFIXES = (*JSON_SUFFIXES, *BUILDERS)
LINES_AT_ONCE = 10_000


@dataclass(frozen=True)
class Rows:
    """A table with our column names. `numbers[i]`: row i's number in its source, from 1 (in JSON lines: the line);
    `sources[source_of[i]]`: that source's name."""

    table: Dataset
    sources: tuple[str, ...]
    source_of: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    @property
    def name(self) -> str:
        return ", ".join(self.sources)

    def origin(self, row: int) -> tuple[str, int]:
        """(source, number) of a row, for messages."""
        return self.sources[self.source_of[row]], int(self.numbers[row])

    def select(self, rows: np.ndarray) -> Rows:
        return Rows(self.table.select(rows), self.sources, self.source_of[rows], self.numbers[rows])


def load(data: DataConfig, seed: int, bad: BadRows) -> Rows:
    """All rows of a data set, or the first `data.limit` of them. Raises DataError."""
    if data.mixture:
        rows = _mix(data, seed, bad)
    elif data.path is None:
        raise DataError("no data: set data.path to a file, a folder, a hub name or example:NAME, or set data.mixture")
    else:
        rows = _load_one(data, data.path, data.split, seed, bad)
    if not len(rows):
        raise DataError(f"{rows.name} has no rows (data.path, data.split)")
    return rows.select(np.arange(min(data.limit, len(rows)))) if data.limit else rows


def _load_one(data: DataConfig, path: str, split: str, seed: int, bad: BadRows) -> Rows:
    if examples.is_example(path):
        options = {"seed": seed, **data.options}
        table = examples.dataset(path.removeprefix(examples.PREFIX), split=split, **options)
    elif Path(path).exists():
        files = _files(Path(path), split)
        if files and files[0].suffix in JSON_SUFFIXES:
            return _named(_read_json(files, bad), data)
        table = _load_files(files, data) if files else _load_saved(Path(path), split)
    elif path.startswith((".", "/", "~")) or Path(path).suffix in SUFFIXES:
        raise DataError(f"there is no file or folder {path} (data.path; looked in {Path.cwd()})")
    else:
        table = _load_hub(path, split, data)
    return _named(_whole(path, table), data)


def _whole(name: str, table: Dataset) -> Rows:
    return Rows(table, (name,), np.zeros(len(table), dtype=np.int64), np.arange(1, len(table) + 1))


def _named(rows: Rows, data: DataConfig) -> Rows:
    """Columns under our names; a column that `data.columns` replaces is left out."""
    names = renamed(rows.table.column_names, data.columns, rows.name)
    changed = {theirs: ours for theirs, ours in names.items() if theirs != ours}
    table = rows.table.select_columns(list(names)).rename_columns(changed) if data.columns else rows.table
    return Rows(table, rows.sources, rows.source_of, rows.numbers)


def _mix(data: DataConfig, seed: int, bad: BadRows) -> Rows:
    """Rows of all entries in the shares of their fractions: as many as can be had without using a row twice."""
    from datasets import concatenate_datasets

    parts = [_load_one(data, entry.path, entry.split, seed, bad) for entry in data.mixture]
    counts = mixture_counts([len(part) for part in parts], data.mixture)
    chosen = [
        part.select(np.sort(np.random.default_rng([seed, index]).permutation(len(part))[:count]))
        for index, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
    try:
        table = concatenate_datasets([part.table for part in chosen])
    except Exception as error:
        columns = "; ".join(f"{part.name}: {', '.join(part.table.column_names)}" for part in parts)
        raise DataError(f"the parts of data.mixture do not fit together: {error}\n  columns of {columns}") from None
    shifts = np.cumsum([0, *(len(part.sources) for part in chosen)])
    return Rows(
        table,
        tuple(source for part in chosen for source in part.sources),
        np.concatenate([part.source_of + shift for part, shift in zip(chosen, shifts, strict=False)]),
        np.concatenate([part.numbers for part in chosen]),
    )


def mixture_counts(lengths: list[int], entries: tuple[MixtureEntry, ...]) -> list[int]:
    """Rows to take of each part: the largest total in which every part has its share of the fractions."""
    shares = np.array([entry.fraction for entry in entries]) / sum(entry.fraction for entry in entries)
    total = min(length / share for length, share in zip(lengths, shares, strict=True))
    return [min(length, round(total * share)) for length, share in zip(lengths, shares, strict=True)]


def _files(path: Path, split: str) -> list[Path]:
    """The data files at a path: the file itself, or those of a folder whose names begin with the split, if any do. None
    for a folder that `datasets` saved."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; readable: {', '.join(SUFFIXES)}"
            )
        if split != "train":
            raise DataError(f"{path} is one file and has no split {split!r}: leave data.split out, or give a folder")
        return [path]
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return []
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    named = [file for file in files if file.name.startswith(split)]
    if not named and (split != "train" or not files):
        shown = ", ".join(file.name for file in files) or "no data file"
        raise DataError(f"{path} has no file for split {split!r}: {shown}; readable: {', '.join(SUFFIXES)}")
    chosen = named or files
    if len({file.suffix for file in chosen}) > 1:
        raise DataError(f"{path} mixes kinds of files for split {split!r}: {', '.join(file.name for file in chosen)}")
    return chosen


def _load_files(files: list[Path], data: DataConfig) -> Dataset:
    suffix = files[0].suffix
    options = {"sep": "\t", **data.options} if suffix == ".tsv" else data.options
    return _loaded(
        str(files[0]), BUILDERS[suffix], data, data_files=[str(file) for file in files], split="train", **options
    )


def _load_hub(name: str, split: str, data: DataConfig) -> Dataset:
    return _loaded(name, name, data, split=split, **data.options)


def _loaded(what: str, builder: str, data: DataConfig, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(builder, cache_dir=str(data.cache_dir) if data.cache_dir else None, **options)
    except Exception as error:  # whatever a builder, a parser or the network raises
        raise DataError(f"cannot load {what}: {type(error).__name__}: {error} (data.path)") from error


def _load_saved(folder: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(map(str, saved))} (data.split)")
    return saved[split]


def _read_json(files: list[Path], bad: BadRows) -> Rows:
    """JSON-lines files, or JSON files that hold one list of rows."""
    from datasets import Dataset

    reader = _JsonReader(bad)
    for index, file in enumerate(files):
        for number, row in json_rows(file, bad):
            reader.add(row, index, number, str(file))
    bad.check()
    table = Dataset(reader.table())
    sources = tuple(map(str, files))
    return Rows(table, sources, np.array(reader.source_of, dtype=np.int64), np.array(reader.numbers, dtype=np.int64))


def json_rows(file: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of every line that holds a JSON object; the other lines go to `bad`."""
    if file.suffix == ".json" and (rows := _json_list(file)) is not None:
        yield from enumerate(rows, start=1)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                bad.add(str(file), number, f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}")
            except ValueError as error:
                bad.add(str(file), number, f"not JSON: {error}")
            else:
                if isinstance(row, dict):
                    yield number, row
                else:
                    bad.add(str(file), number, f"a JSON {type(row).__name__}, not an object")


def _json_list(file: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that is one JSON list; None if it is not (then it may be JSON lines)."""
    with file.open("rb") as opened:
        if opened.read(64).lstrip()[:1] != b"[":
            return None
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error} (data.path)") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} must hold a list of objects (data.path)")
    return rows


class _JsonReader:
    """Rows as they come, as an Arrow table in chunks; a row whose types do not go with those before it is a bad row."""

    def __init__(self, bad: BadRows) -> None:
        self.source_of: list[int] = []
        self.numbers: list[int] = []
        self._bad = bad
        self._chunks: list[pa.Table] = []
        self._pending: list[tuple[dict[str, Any], int, int, str]] = []
        self._schema: pa.Schema | None = None

    def add(self, row: dict[str, Any], source: int, number: int, name: str) -> None:
        self._pending.append((row, source, number, name))
        if len(self._pending) == LINES_AT_ONCE:
            self._flush()

    def table(self) -> pa.Table:
        import pyarrow as pa

        self._flush()
        return pa.concat_tables(self._chunks, promote_options="permissive") if self._chunks else pa.table({})

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        try:
            self._take(self._pending)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            for entry in self._pending:
                try:
                    self._take([entry])
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    self._bad.add(entry[3], entry[2], f"its types differ from those of the rows before: {error}")
        self._pending = []

    def _take(self, entries: list[tuple[dict[str, Any], int, int, str]]) -> None:
        import pyarrow as pa

        names = dict.fromkeys(name for row, *_ in entries for name in row)
        chunk = pa.table({name: [row.get(name) for row, *_ in entries] for name in names})
        schemas = [chunk.schema] if self._schema is None else [self._schema, chunk.schema]
        self._schema = pa.unify_schemas(schemas, promote_options="permissive")
        self._chunks.append(chunk)
        self.source_of += [source for _, source, _, _ in entries]
        self.numbers += [number for _, _, number, _ in entries]
