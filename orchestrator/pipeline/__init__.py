"""What a method is made of: a kind of data, and stages, each one verb by one role. Pure: neither Ray nor torch.

`data_kinds.py` has the kinds of data, `verbs.py` a function per verb, `stage.py` what they return, `pipeline.py` what
follows from a sequence of stages, `checks.py` what it must satisfy.
"""

from __future__ import annotations

from orchestrator.pipeline.data_kinds import (
    AnsweredPrompts,
    Completions,
    DataKind,
    JudgedCompletions,
    Labelled,
    MismatchedLabelled,
    Pairs,
    PairsWithMargin,
    Prompts,
    StepLabels,
    Triples,
    UncutPairs,
    WeightedLabelled,
    items_of,
)
from orchestrator.pipeline.pipeline import Pipeline
from orchestrator.pipeline.stage import DRIVER, GROUPWISE, ROW_SOURCES, Stage, Verb, in_conflict
from orchestrator.pipeline.verbs import (
    behind_teacher_prompts,
    credit,
    generate,
    infer,
    infer_top_k,
    keep,
    mix,
    one_of,
    only_where,
    regroup,
    replay,
    retokenised,
    score,
    take,
    update,
    when,
    write,
)

__all__ = [
    "DRIVER",
    "GROUPWISE",
    "ROW_SOURCES",
    "AnsweredPrompts",
    "Completions",
    "DataKind",
    "JudgedCompletions",
    "Labelled",
    "MismatchedLabelled",
    "Pairs",
    "PairsWithMargin",
    "Pipeline",
    "Prompts",
    "Stage",
    "StepLabels",
    "Triples",
    "UncutPairs",
    "Verb",
    "WeightedLabelled",
    "behind_teacher_prompts",
    "credit",
    "generate",
    "in_conflict",
    "infer",
    "infer_top_k",
    "items_of",
    "keep",
    "mix",
    "one_of",
    "only_where",
    "regroup",
    "replay",
    "retokenised",
    "score",
    "take",
    "update",
    "when",
    "write",
]
