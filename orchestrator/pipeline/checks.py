"""What the stages of a pipeline must satisfy. Checked when it is built, so before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

from actors.columns import COLUMNS, Axis
from actors.errors import ConfigError
from orchestrator.pipeline.data_kinds import DataKind
from orchestrator.pipeline.stage import ROW_SOURCES, Stage, Verb, roles_of, rows_by_share


def check(data: DataKind, stages: Sequence[Stage]) -> None:
    """Raises ConfigError if the stages do not form a pipeline on this kind of data."""
    _check_columns(data, stages)
    _check_row_sources(data, stages)
    _check_heads(stages)
    _check_companions(stages)
    _check_mixes(stages)
    _check_replays(stages)
    _check_precomputed(data, stages)
    _check_writes(stages)


def _check_columns(data: DataKind, stages: Sequence[Stage]) -> None:
    """Every column that a stage reads is in the data or written by an earlier stage."""
    written = set(data.columns)
    for stage in stages:
        unknown = sorted((stage.reads | stage.writes) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"stage {stage.name} names unknown column(s) {', '.join(unknown)}")
        if stage.verb is Verb.CREDIT and stage.reads_tokens and len({COLUMNS[name].axis for name in stage.writes}) > 1:
            raise ConfigError(
                f"stage {stage.name} runs where the tokens are and writes {', '.join(sorted(stage.writes))}, of which "
                "some are per token and some per row; make it two credit calls"
            )
        if stage.only is not None and (stage.verb is not Verb.INFER or any(map(_per_row, stage.writes))):
            raise ConfigError(f"stage {stage.name} runs for some rows only; just one that infers columns per token may")
        missing = sorted(stage.reads - written)
        if missing:
            raise ConfigError(
                f"stage {stage.name} reads {', '.join(missing)}, which no earlier stage writes "
                f"(written so far: {', '.join(sorted(written)) or 'nothing'})"
            )
        written |= stage.writes


def _per_row(name: str) -> bool:
    return COLUMNS[name].axis is Axis.ROW


def _check_row_sources(data: DataKind, stages: Sequence[Stage]) -> None:
    """Every prompt group gets rows."""
    for stage in stages:
        if stage.verb is Verb.TAKE and not data.answered:
            raise ConfigError(f"stage {stage.name} takes completions, and {data.name} bring none apart")
        if stage.share != (0.0, 1.0) and stage.verb not in ROW_SOURCES:
            raise ConfigError(f"stage {stage.name} runs for a share of the prompt groups; only generate and take may")
    sources = [stage for stage in stages if stage.verb in ROW_SOURCES]
    if sources and not all(rows_by_share(sources)):
        shares = ", ".join(f"{stage.name} {stage.share[0]:g} to {stage.share[1]:g}" for stage in sources)
        raise ConfigError(f"some prompt groups get no rows: {shares}; together they must cover 0 to 1")


def _check_heads(stages: Sequence[Stage]) -> None:
    """A role has one model, and a model one head."""
    for role in dict.fromkeys(stage.role for stage in stages):
        asked = {stage.head for stage in stages if stage.role == role and stage.head is not None}
        if len(asked) > 1:
            raise ConfigError(
                f"the stages of role {role} ask for models with different heads ({', '.join(sorted(asked))}); use a "
                "role for each"
            )


def _check_companions(stages: Sequence[Stage]) -> None:
    trained = roles_of(Verb.UPDATE, stages)
    for role in trained:
        updates = (stage for stage in stages if stage.verb is Verb.UPDATE and stage.role == role)
        named = sorted({str(stage.options["companion"]) for stage in updates} - {"None"})
        if len(named) > 1 or set(named) & set(trained):
            raise ConfigError(
                f"role {role} has the companions {', '.join(named)}: it may have one, which is not trained in the phase"
            )


def _check_mixes(stages: Sequence[Stage]) -> None:
    """Weights move from a trained role to one that is not."""
    trained = roles_of(Verb.UPDATE, stages)
    for stage in stages:
        if stage.verb is not Verb.MIX:
            continue
        source = stage.options["source"]
        if source not in trained or stage.role in trained:
            raise ConfigError(
                f"stage {stage.name} moves {stage.role} towards {source}: the one must not be trained and the other "
                f"must be (trained: {', '.join(trained) or 'nothing'})"
            )


def _check_replays(stages: Sequence[Stage]) -> None:
    found = [stage for stage in stages if stage.verb is Verb.REPLAY]
    if len(found) > 1:
        raise ConfigError(f"{len(found)} stages replay prompt groups; a phase has one buffer of them, for one stage")


def _check_precomputed(data: DataKind, stages: Sequence[Stage]) -> None:
    for stage in stages:
        problem = why_not_beforehand(data, stages, stage) if stage.precomputed else None
        if problem:
            raise ConfigError(
                f"options.precompute_ref_log_probs: {problem}, so {stage.name} cannot run beforehand; leave it out"
            )


def why_not_beforehand(data: DataKind, stages: Sequence[Stage], stage: Stage) -> str | None:
    """Why a stage cannot run once, before the first step; None if it can. What it computes must hold for the whole
    phase: the rows are there, and the weights stay."""
    if data.prompts_only or data.answered:
        return f"{data.name} have no rows before they are answered"
    if "mismatched" in data.columns:
        return f"mismatched rows are made anew of each batch, and {data.name} needs them"
    if stage.role in roles_of(Verb.UPDATE, stages):
        return f"the weights of {stage.role} change in every step"
    if stage.role in roles_of(Verb.MIX, stages):
        return f"the weights of {stage.role} follow those of another role"
    return None


def _check_writes(stages: Sequence[Stage]) -> None:
    """A phase makes one data set at most. Without a trained role no ranks compute where the tokens are."""
    if sum(stage.verb is Verb.WRITE for stage in stages) > 1:
        raise ConfigError("several stages write; a phase makes one data set, so give it one such stage")
    if any(stage.verb is Verb.WRITE for stage in stages) and not roles_of(Verb.UPDATE, stages):
        for stage in stages:
            if stage.verb is Verb.CREDIT and stage.reads_tokens:
                raise ConfigError(
                    f"stage {stage.name} reads {', '.join(sorted(stage.reads))} where the tokens are, on the ranks of "
                    "a trained role, and the pipeline trains none"
                )
