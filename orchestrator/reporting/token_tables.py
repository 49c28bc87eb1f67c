"""Tables of the tokens of samples, beside the table of completions: for each token its text, the mask, and what is
known of it (log-probabilities, advantage ...).

    RUN/tokens/step_N.parquet    a line per row that was learned from:
        row               which line of completions/step_N.parquet it is of; the turns of an episode may be several
        start, total      the first token that is kept, and how many tokens the row has
        pieces            text of each kept token (`token_pieces.py`)
        mask              whether it is learned from
        sample_logps ...  the batch's columns per token (`actors/columns.py`), null where the model did not write

What a run keeps is bounded: so many rows of a step, so many tokens of a row, so many steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.batch import Array, Batch
from actors.columns import COLUMNS, Axis
from orchestrator.batches.row_table import RowTable
from orchestrator.reporting.token_pieces import Pieces

FOLDER = "tokens"
PROMPT_SHARE = 4  # of the tokens that are kept of a long row, at most one in so many is of the prompt
VALUES = tuple(
    name
    for name, column in COLUMNS.items()
    if column.axis is Axis.TOKEN and column.dtype == np.float32 and not column.wide
)


@dataclass(frozen=True)
class TokenLimits:
    """What is kept: `rows` of a step, `tokens` of a row, tables of the newest `steps`."""

    rows: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one row that are kept. `values`: [n] float32 each, NaN where nothing is known."""

    row: int
    start: int
    total: int
    tokens: Array
    mask: Array
    values: Mapping[str, Array]


def chosen_rows(table: RowTable, numbers: Mapping[int, int], limit: int, most_fetched: int) -> tuple[Array, Array]:
    """Rows of the table whose tokens are kept, and the line of each in the table of completions. `numbers`: of a prompt
    group, the line of its first sample.

    Whole groups, so that samples of a prompt can be compared, in the order of `numbers`, until `limit` rows; of the
    first group as many rows as that. A group is left out if then more than `most_fetched` tokens would come into the
    driver: a block that a rank computed holds all of its rows."""
    if "sample" not in table:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    groups, found, blocks = table["group"], list[Array](), set[int]()
    wanted = _stored(table)
    sizes = _tokens_of_blocks(table, wanted)
    for position in numbers:
        rows = np.flatnonzero(groups == position)[: None if found else limit]
        needed = blocks.union(*(each[rows].tolist() for each in wanted)) - {-1}
        if len(rows) and sum(map(len, found)) + len(rows) <= limit and sizes[list(needed)].sum() <= most_fetched:
            found.append(rows)
            blocks = needed
    chosen = np.concatenate([np.zeros(0, np.int64), *found])
    first = np.array([numbers[position] for position in groups[chosen].tolist()], np.int64)
    return chosen, first + table["sample"][chosen]


def columns_of(table: RowTable) -> frozenset[str]:
    """What a table has that is kept."""
    return frozenset({"tokens", "mask", "learned", *VALUES}) & table.columns


def token_rows(table: RowTable, blocks: Sequence[Batch], lines: Array, limit: int) -> list[TokenRow]:
    """Of every row of a table what is kept of it. `blocks`: the table's own."""
    return [_token_row(table, blocks, row, int(line), limit) for row, line in enumerate(lines.tolist())]


def write(folder: Path, step: int, rows: Sequence[TokenRow], pieces: Pieces, limits: TokenLimits) -> Path:
    """Write the table of a step as a whole or not at all, and remove those of old steps."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    file = folder / f"step_{step:06d}.parquet"
    columns: dict[str, Any] = {
        "row": pa.array([each.row for each in rows], pa.int32()),
        "start": pa.array([each.start for each in rows], pa.int32()),
        "total": pa.array([each.total for each in rows], pa.int32()),
        "pieces": pa.array([pieces.of(each.tokens.tolist()) for each in rows], pa.list_(pa.string())),
        "mask": _lists([each.mask for each in rows]),
    }
    for name in dict.fromkeys(name for each in rows for name in each.values):
        columns[name] = _lists([each.values.get(name, np.full(len(each.mask), np.nan, np.float32)) for each in rows])
    temporary = file.with_suffix(".tmp")
    parquet.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(file)
    for old in of_steps(folder)[: -limits.steps]:
        old.unlink(missing_ok=True)
    return file


def of_steps(folder: Path) -> list[Path]:
    """The tables of steps in a folder, the oldest first."""
    named = (file for file in folder.glob("step_*.parquet") if file.stem.removeprefix("step_").isdigit())
    return sorted(named, key=step_of)


def step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def read(folder: Path, step: int, lines: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
    """For each of these lines of the step's completions whose tokens are kept, its rows: `start`, `total`, `pieces`,
    `mask` and `values`, by column. Raises FileNotFoundError if nothing of the step is kept."""
    from pyarrow import parquet

    table = parquet.ParquetFile(folder / f"step_{step:06d}.parquet").read()
    wanted = set(lines)
    table = table.take([place for place, line in enumerate(table["row"].to_pylist()) if line in wanted])
    found: dict[int, list[dict[str, Any]]] = {}
    for entry in table.to_pylist():
        shown = {name: entry.pop(name) for name in ("start", "total", "pieces", "mask")}
        line = entry.pop("row")
        values = {name: [_short(each) for each in of] for name, of in entry.items()}
        known = {name: of for name, of in values.items() if any(each is not None for each in of)}
        found.setdefault(line, []).append({**shown, "values": known})
    return found


def _stored(table: RowTable) -> list[Array]:
    """[B] each: in which block the rows' values are, of the stored columns that are kept."""
    kept = columns_of(table)
    return [each.blocks for each in table.stored if each.names & kept]


def _tokens_of_blocks(table: RowTable, stored: Sequence[Array]) -> Array:
    """Tokens that each block holds, of this table's rows."""
    sizes = np.zeros(len(table.blocks), np.int64)
    for blocks in stored:
        there = blocks >= 0
        held = np.bincount(blocks[there], weights=table.lengths[there], minlength=len(sizes)).astype(np.int64)
        sizes = np.maximum(sizes, held)
    return sizes


def _token_row(table: RowTable, blocks: Sequence[Batch], row: int, line: int, limit: int) -> TokenRow:
    total = int(table.lengths[row])
    tokens, written = _values(table, blocks, row, "tokens"), _values(table, blocks, row, "mask")
    assert tokens is not None and written is not None, "every row has tokens and a mask"
    start = _start(written, limit)
    kept = slice(start, start + limit)
    learned = bool(table["learned"][row]) if "learned" in table else True
    known = {name: _values(table, blocks, row, name) for name in VALUES if name in table}
    values = {
        name: np.where(written, found, np.float32(np.nan))[kept] for name, found in known.items() if found is not None
    }
    return TokenRow(line, start, total, tokens[kept], written[kept] & learned, values)


def _values(table: RowTable, blocks: Sequence[Batch], row: int, name: str) -> Array | None:
    """[n] of one row; None if no stage wrote it for this row."""
    if name in table.spread:
        return np.full(int(table.lengths[row]), table.spread[name][row])
    for each in table.stored:
        if name in each.names:
            block = int(each.blocks[row])
            return None if block < 0 else blocks[block].row(name, int(each.rows[row]))
    return table.rows.row(name, row)


def _start(written: Array, limit: int) -> int:
    """The first token that is kept: of a row that is too long, little of the prompt, and then as much as there is room
    for."""
    over = len(written) - limit
    if over <= 0:
        return 0
    prompt = int(written.argmax()) if written.any() else 0
    return max(0, min(over, prompt - limit // PROMPT_SHARE))


def _lists(arrays: Sequence[Array]) -> Any:
    """A column of lists; NaN becomes null."""
    import pyarrow as pa

    ends = np.cumsum([0, *(len(each) for each in arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(arrays), from_pandas=True))


def _short(value: float | None) -> float | None:
    """Five significant digits are more than a reader sees."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")
