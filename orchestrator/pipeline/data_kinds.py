"""The kinds of data that a pipeline can take, by the columns that a batch of each has from the start."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DataKind:
    """What a row of the data source supplies. `columns`: those that its batch has from the start. Which columns of a
    data set can be read as which kind is decided by `orchestrator/data/formats.py`."""

    name: str
    columns: frozenset[str]
    rows_per_item: int = 1
    prompts_only: bool = False
    answered: bool = False  # prompts, each with a completion that a `take` stage makes a row of the group
    uncut: bool = False  # a row is judged as a whole: an item with one that is too long is left out, not cut
    step_separator: str = "\n"  # of an answer in labelled steps: the text after each of them
    last_step_only: bool = False  # of its labels, only that of the last step counts
    teachers: tuple[str, ...] = ()  # one of which each item names in its column `teacher`
    teacher_template: str | None = None  # of the text that a teacher reads in the place of each prompt
    teacher_tokenizer: tuple[str, bool] | None = None  # in whose tokens: where it is, whether its code is trusted

    def with_teachers(self, names: tuple[str, ...]) -> DataKind:
        """The same items, each of which names a teacher. None are named: as it is."""
        return replace(self, columns=self.columns | {"teacher"}, teachers=names) if names else self

    def with_teacher_prompts(self, template: str) -> DataKind:
        """The same items, each with a second prompt, for the teacher: see `orchestrator/data/teacher_prompts.py`."""
        names = {"teacher_prompt", "teacher_row_tokens"}
        return replace(self, columns=self.columns | names, teacher_template=template)


def items_of(kind: DataKind) -> str:
    """What the items of a data set are called in messages."""
    return kind.name if kind.name in ("prompts", "pairs") else "examples"


_ROWS = frozenset({"tokens", "mask", "group"})

Completions = DataKind("completions", _ROWS)
Prompts = DataKind("prompts", frozenset(), prompts_only=True)
AnsweredPrompts = DataKind("answered_prompts", frozenset(), answered=True, uncut=True)
JudgedCompletions = DataKind("judged_completions", frozenset(), answered=True, uncut=True)  # blank ones, too
Pairs = DataKind("pairs", _ROWS | {"preferred"}, rows_per_item=2)
UncutPairs = replace(Pairs, uncut=True)
PairsWithMargin = DataKind("pairs_with_margin", Pairs.columns | {"margin"}, rows_per_item=2, uncut=True)
Triples = DataKind("triples", _ROWS | {"preferred", "imitated"}, rows_per_item=3)
Labelled = DataKind("labelled", _ROWS | {"label"})
WeightedLabelled = DataKind("weighted_labelled", Labelled.columns | {"weight"})  # by density ratio
MismatchedLabelled = DataKind(  # each row with a second one: its prompt with another row's completion
    "mismatched_labelled", Labelled.columns | {"mismatched"}, rows_per_item=2
)
StepLabels = DataKind("step_labels", _ROWS | {"step_label"})
