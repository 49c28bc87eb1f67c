"""A row table in a checkpoint: its columns as arrays, with the values that lie in blocks; and back, into blocks of the
run that is resumed.

    rows/NAME     a column, one value a row or a token
    spread/NAME   a column per token that has one value a row
    lengths       of the rows; absent if there are none
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from actors.batch import Array, Batch
from actors.columns import COLUMNS
from actors.worker import Objects
from orchestrator.batches.row_table import RowTable

FETCH_TIMEOUT_S = 120.0
Arrays = dict[str, Array]
Layout = list[list[str]]  # which columns lie in blocks together


async def packed(table: RowTable, objects: Objects) -> tuple[Layout, Arrays]:
    """(which columns lie in blocks together, the arrays). Raises BlockLost if a block is gone with its node."""
    if not len(table):
        return [], {}
    blocks = await asyncio.gather(*(objects.get(ref, timeout_s=FETCH_TIMEOUT_S) for ref in table.blocks))
    whole = table.whole().shard.fetched(blocks).batch
    arrays = {f"rows/{name}": values for name, values in whole.columns.items() if name not in table.spread}
    arrays |= {f"spread/{name}": values for name, values in table.spread.items()}
    return [sorted(each.names) for each in table.stored], {**arrays, "lengths": whole.lengths}


async def unpacked(stored: Sequence[Sequence[str]], arrays: Mapping[str, Array], objects: Objects) -> RowTable:
    """The table with its columns where they were: in the driver, or in blocks."""
    if "lengths" not in arrays:
        return RowTable(Batch.empty())
    whole = Batch.build(arrays["lengths"], **_below("rows/", arrays))
    everywhere = np.arange(len(whole))
    table = RowTable(whole).without(name for names in stored for name in names)
    table = table.with_values(**_below("spread/", arrays))
    for names in stored:
        table = table.with_blocks(names, [(everywhere, await objects.put(whole.only(names)))])
    return table


def misfit(arrays: Mapping[str, Array], written: Set[str]) -> str:
    """How the columns of a saved table differ from those of a new one, which has at least `written`; empty if they do
    not, or if it has no rows."""
    columns = {*_below("rows/", arrays), *_below("spread/", arrays)}
    lacking, unknown = sorted(written - columns), sorted(columns - COLUMNS.keys())
    differences = [
        f"their rows {verb} {', '.join(names)}" for verb, names in (("lack", lacking), ("have", unknown)) if names
    ]
    return " and ".join(differences) if "lengths" in arrays else ""


async def write(file: Path, arrays: Arrays) -> None:
    await asyncio.to_thread(_write, file, arrays)


async def read(file: Path) -> Arrays:
    """Only data is read, whoever wrote the file."""
    return await asyncio.to_thread(_read, file)


def numbered(index: int, arrays: Arrays) -> Arrays:
    """The arrays of a table, named as those of one of several in a file; `of_number` finds them again."""
    return {f"{index}/{name}": values for name, values in arrays.items()}


def of_number(index: int, arrays: Arrays) -> Arrays:
    return _below(f"{index}/", arrays)


def _below(prefix: str, arrays: Mapping[str, Array]) -> Arrays:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def _write(file: Path, arrays: Arrays) -> None:
    with file.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _read(file: Path) -> Arrays:
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
