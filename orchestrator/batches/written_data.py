"""What a `write` stage does with a batch: its completions become texts, with the prompts that they answer and the
other columns of these, and go into the part of the step."""

# pyright: basic
# (tokenizers are typed in part only)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.batch import Batch
from actors.columns import COLUMNS, Axis
from orchestrator.batches.records import Answered, Record
from orchestrator.data.conversation import ASSISTANT, Content, as_messages
from orchestrator.data.formats import carried
from orchestrator.data.parts import Parts
from orchestrator.data.source import Source
from orchestrator.pipeline import Stage


@dataclass(frozen=True)
class Output:
    """The data set that a phase makes, and what its records are made of besides the batch. `reward_names`: of the
    columns of `reward_parts`, in their order. `turns`: completions are turns of conversations, also where the prompt is
    a text."""

    parts: Parts
    source: Source
    tokenizer: Any
    reward_names: tuple[str, ...] = ()
    turns: bool = False

    def write(self, stage: Stage, batch: Batch, step: int) -> dict[str, float]:
        """The batch of a step, counted from 0; its metrics."""
        records = list(self._records(stage, batch))
        self.parts.write(step + 1, records)
        prompts = len(np.unique(batch["group"])) if len(batch) else 0
        return {"written/records": float(len(records)), "written/prompts": float(prompts)}

    def _records(self, stage: Stage, batch: Batch) -> Iterator[Record]:
        """In the order of the prompts' positions."""
        assert stage.call is not None
        groups = batch["group"] if len(batch) else np.zeros(0, np.int64)
        for position in np.unique(groups).tolist():
            rows = np.flatnonzero(groups == position)
            index = self.source.order.at(position)[1]
            prompt: Any = self.source.item(index)  # a Prompt: it was answered
            columns = {name: values[rows] for name, values in batch.columns.items() if COLUMNS[name].axis is Axis.ROW}
            asked = as_messages(prompt.prompt) if self.turns else prompt.prompt
            texts = self._completions(asked, batch, rows.tolist())
            answered = Answered(asked, texts, columns, index, self.reward_names)
            made: list[Record] = stage.call(answered, **stage.options)
            beside = {name: prompt.columns[name] for name in carried(prompt.columns)}
            yield from ({**beside, **record} for record in made)

    def _completions(self, prompt: Content, batch: Batch, rows: Sequence[int]) -> tuple[Content, ...]:
        """What the model wrote in those rows. To a conversation it is the assistant's next turn."""
        ids = [batch.row("tokens", row)[batch.row("mask", row)].tolist() for row in rows]
        texts = [str(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        if isinstance(prompt, str):
            return tuple(texts)
        return tuple([{"role": ASSISTANT, "content": text}] for text in texts)
