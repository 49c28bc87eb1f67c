"""Keeps the tokens of a step's samples, beside the loop: the next step goes on meanwhile.

step N ── which rows, references to their blocks ──► task ── blocks ──► thread: texts of tokens, RUN/tokens/step_N
step N+1 waits for the task of step N, which has ended long ago, before it starts its own
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from actors.batch import Array, Batch
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.shutdown import Stopped
from orchestrator.collection.collected import cancel
from orchestrator.collection.group_stages import PromptGroup
from orchestrator.executor import Executor
from orchestrator.phases.run_context import RunContext
from orchestrator.reporting.token_pieces import Pieces
from orchestrator.reporting.token_tables import TokenLimits, chosen_rows, columns_of, token_rows

MOST_FETCHED = 2**20  # tokens of the blocks that come into the driver in one step


class TokenRecorder:
    """Of one phase; as a context manager, it ends with what it has begun, unless an error ends the phase."""

    def __init__(self, context: RunContext, roles: Executor) -> None:
        logging = context.config.logging
        self._context, self._roles = context, roles
        self._limits = TokenLimits(logging.token_samples or 0, logging.token_length, logging.token_steps)
        self._pieces: Pieces | None = None  # until the first table
        self._writing: asyncio.Task[None] | None = None
        self._said = False

    async def __aenter__(self) -> TokenRecorder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None and error is not None and not isinstance(error, Stopped):
            await cancel([self._writing])  # what it reads may be gone: it could wait for its deadline
        else:
            await self._ended()

    async def record(self, step: int, table: RowTable, groups: Sequence[PromptGroup]) -> None:
        """Start to keep the tokens of a step. `groups`: as they are in the table of completions. The rows that were
        learned from are those of `table`."""
        await self._ended()
        if not self._limits.rows:
            return
        starts = np.cumsum([0, *(len(group.own) for group in groups)]).tolist()
        numbers = {group.position: start for group, start in zip(groups, starts, strict=False)}
        rows, lines = chosen_rows(table, numbers, self._limits.rows, MOST_FETCHED)
        if len(rows):
            kept = table.select(rows).only(columns_of(table))  # no other block is held any longer
            self._writing = asyncio.ensure_future(self._write(step, kept, lines))
        elif len(table) and not self._said:
            self._said = True
            self._context.event("no_tokens_kept", {"step": step, "rows": len(table), "tokens": table.num_tokens})

    async def _write(self, step: int, table: RowTable, lines: Array) -> None:
        try:
            blocks = await self._roles.fetch(table.blocks)
            await asyncio.to_thread(self._write_now, step, table, blocks, lines)
        except Exception as error:  # a record that nothing depends on must not end the training
            self._context.console.warn(f"tokens of step {step} not written: {type(error).__name__}: {error}")

    def _write_now(self, step: int, table: RowTable, blocks: Sequence[Batch], lines: Array) -> None:
        self._pieces = self._pieces or Pieces(self._context.prepared.tokenizer)
        found = token_rows(table, blocks, lines, self._limits.tokens)
        self._context.log.write_tokens(step, found, self._pieces, self._limits)

    async def _ended(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing
