"""Files, folders and hub names as tables: which files a path means, and which builder of `datasets` reads them."""

# pyright: basic
# (datasets is typed in part only)

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data import synthetic_examples as examples
from orchestrator.data.json_lines import JSON_SUFFIXES

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
TEXTS = ("text", "prompt", "completion", "chosen", "rejected", "reference")  # our columns that hold texts
SUFFIXES = (*JSON_SUFFIXES, *BUILDERS)


def json_files(path: str, split: str) -> list[Path]:
    """The JSON files that a path means; none if it means something else."""
    if examples.is_example(path) or not Path(path).exists():
        return []
    files = data_files(Path(path), split)
    return files if files and files[0].suffix in JSON_SUFFIXES else []


def table(data: DataConfig, path: str, split: str, seed: int, *, streaming: bool = False) -> Any:
    """What is at a path that does not mean JSON files: a data set, or with `streaming` an iterable of rows."""
    if examples.is_example(path):
        return examples.dataset(path.removeprefix(examples.PREFIX), split=split, **{"seed": seed, **data.options})
    if Path(path).exists():
        files = data_files(Path(path), split)
        return _files_table(files, data, streaming) if files else _saved(Path(path), split)
    if path.startswith((".", "/", "~")) or Path(path).suffix in SUFFIXES:
        raise DataError(f"there is no file or folder {path} (data.path; looked in {Path.cwd()})")
    return _loaded(path, path, data, split=split, streaming=streaming, **data.options)


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
        raise DataError(f"{path} mixes kinds of files for split {split!r}: {', '.join(file.name for file in chosen)}")
    return chosen


def _files_table(files: list[Path], data: DataConfig, streaming: bool) -> Any:
    suffix, options = files[0].suffix, data.options
    if BUILDERS[suffix] == "csv":
        options = {**_table_options(suffix, data), **options}
        for file in files:
            _refuse_more_cells_than_columns(file, options.get("sep", ","))
    return _loaded(
        str(files[0]),
        BUILDERS[suffix],
        data,
        data_files=[str(file) for file in files],
        split="train",
        streaming=streaming,
        **options,
    )


def _table_options(suffix: str, data: DataConfig) -> dict[str, Any]:
    """A table of text has no types: what looks like a number in a column of texts is a text all the same."""
    texts: dict[str, Any] = {data.columns.get(name, name): str for name in TEXTS}
    return {"converters": texts} | ({"sep": "\t"} if suffix == ".tsv" else {})


def _refuse_more_cells_than_columns(file: Path, separator: str) -> None:
    """Where the first row has more cells than there are columns, pandas takes the first cells for names of rows and
    shifts the others. It does refuse later rows that are longer than the first."""
    with file.open(newline="", errors="replace") as opened:
        rows = csv.reader(opened, delimiter=separator)
        header, first = next(rows, []), next(rows, [])
    if len(first) > len(header):
        raise DataError(f"{file}: row 1 has {len(first)} cells for {len(header)} columns ({', '.join(header)})")


def _loaded(what: str, builder: str, data: DataConfig, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(builder, cache_dir=str(data.cache_dir) if data.cache_dir else None, **options)
    except Exception as error:  # whatever a builder, a parser or the network raises
        cause = error
        while cause.__cause__ is not None:  # a builder says that something went wrong; what it was, the first one knows
            cause = cause.__cause__
        raise DataError(f"cannot load {what}: {type(cause).__name__}: {cause} (data.path)") from error


def _saved(folder: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(map(str, saved))} (data.split)")
    return saved[split]
