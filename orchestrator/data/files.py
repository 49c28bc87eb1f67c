"""Files, folders and hub names as tables: which files a path means, and which builder of `datasets` reads them."""

# pyright: basic
# (datasets has incomplete types)

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data import synthetic_examples as examples
from orchestrator.data.json_lines import JSON_SUFFIXES
from orchestrator.data.tables import ArrowTable, Read, Row, without_added_nulls

BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}  # their spellings in CSV files
NUMBERS = ("weight", "margin")  # columns that hold numbers, if data.columns names them
SUFFIXES = (*JSON_SUFFIXES, *BUILDERS)


def json_files(data: DataConfig, path: str, split: str) -> list[Path]:
    """The JSON files at a path; empty if it has other files."""
    if examples.is_example(path) or not Path(path).exists():
        return []
    files = data_files(Path(path), split)
    if not files or files[0].suffix not in JSON_SUFFIXES:
        return []
    if data.options:
        raise DataError(
            f"data.options: {', '.join(data.options)}: options are for example:NAME and for datasets.load_dataset, "
            f"and {path} is JSON, which is read without it; leave them out"
        )
    return files


def table(data: DataConfig, path: str, split: str, seed: int) -> ArrowTable:
    """The table at a path without JSON files."""
    found, read = _opened(data, path, split, seed, streaming=False)
    return ArrowTable(found, read)


def streamed(data: DataConfig, path: str, split: str, seed: int) -> Iterator[Row]:
    """The rows of `table`, one by one."""
    found, read = _opened(data, path, split, seed, streaming=True)
    return map(read, found)


def _opened(data: DataConfig, path: str, split: str, seed: int, *, streaming: bool) -> tuple[Any, Read]:
    """A data set, or with `streaming` an iterable of rows; and a function that restores its rows as they were
    written."""
    if examples.is_example(path):
        name = path.removeprefix(examples.PREFIX)
        found = examples.dataset(name, split=split, **{"seed": seed, **data.options})
    elif Path(path).exists():
        files = data_files(Path(path), split)
        if files and BUILDERS[files[0].suffix] == "csv":
            return _csv(files, data, streaming), _cells_read(data)
        found = _files_table(files, data, streaming, data.options) if files else _saved(Path(path), split)
    elif path.startswith((".", "/", "~")) or Path(path).suffix in SUFFIXES:
        raise DataError(f"there is no file or folder {path} (data.path; looked in {Path.cwd()})")
    else:
        found = _loaded(path, path, data, split=split, streaming=streaming, **data.options)
    return found, without_added_nulls(found.features)


def data_files(path: Path, split: str) -> list[Path]:
    """The data files at a path: the file itself, or those of a folder whose names begin with the split, if any do.
    None for a folder that `datasets` saved."""
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
        raise DataError(
            f"{path} mixes kinds of files for split {split!r}: {', '.join(file.name for file in chosen)}; name one of "
            "them in data.path, or each in an entry of data.mixture"
        )
    return chosen


def _csv(files: list[Path], data: DataConfig, streaming: bool) -> Any:
    """A CSV file has no types: every cell is a string, including `007`, `NA` and an empty one."""
    given = {**({"sep": "\t"} if files[0].suffix == ".tsv" else {}), **data.options}
    columns = max(_checked_header(file, given) for file in files)
    as_text = {"converters": dict.fromkeys(range(columns), str), "keep_default_na": False, "na_filter": False}
    return _files_table(files, data, streaming, {**as_text, **given})


def _files_table(files: list[Path], data: DataConfig, streaming: bool, options: dict[str, Any]) -> Any:
    paths = [str(file) for file in files]
    builder = BUILDERS[files[0].suffix]
    return _loaded(paths[0], builder, data, data_files=paths, split="train", streaming=streaming, **options)


def _checked_header(file: Path, options: dict[str, Any]) -> int:
    """Columns of a CSV file. Raises DataError for a row with more or fewer cells: pandas would use the first cells of a
    longer first row as its name and shift the others, and would pad a shorter row."""
    separator = options.get("sep") or options.get("delimiter") or ","
    with file.open(newline="", errors="replace") as opened:
        rows = (row for row in csv.reader(opened, delimiter=separator) if row)
        header = next(rows, [])
        for number, row in enumerate(rows if set(options) <= {"sep", "delimiter"} else (), start=1):
            if len(row) != len(header):
                cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
                raise DataError(
                    f"{file}: row {number} has {cells} for {len(header)} columns ({', '.join(header)}); quote a cell "
                    f"that holds {separator!r}, and give an empty one its separator"
                )
    return len(header)


def _cells_read(data: DataConfig) -> Read:
    """Parses our columns of numbers and booleans; a cell that cannot be parsed stays a string, and its row is refused
    later."""
    label = data.columns.get("label", "label")
    numbers = [data.columns[name] for name in NUMBERS if name in data.columns]

    def read(row: Row) -> Row:
        changed: Row = {}
        if isinstance(row.get(label), str):
            changed[label] = BOOLEANS.get(row[label].strip().lower(), row[label])
        for name in numbers:
            if isinstance(row.get(name), str):
                changed[name] = _number(row[name])
        return {**row, **changed}

    return read


def _number(cell: str) -> float | str | None:
    if not cell.strip():
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def _loaded(what: str, builder: str, data: DataConfig, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(builder, cache_dir=str(data.cache_dir) if data.cache_dir else None, **options)
    except Exception as error:  # a builder, a parser or the network may raise anything
        cause = error
        while cause.__cause__ is not None:  # a builder's own error is generic; the first cause has the reason
            cause = cause.__cause__
        raise DataError(f"cannot load {what}: {type(cause).__name__}: {cause} (data.path)") from error


def _saved(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(map(str, saved))} (data.split)")
    return saved[split]
