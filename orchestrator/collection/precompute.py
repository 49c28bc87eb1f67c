"""What a frozen role says about every row of a data set, computed once before the first step of a phase.

    stage, data, weights ──► folder of the cache ── there ─────────► the data brings the column, no role is needed
                                                 └─ not there: one pass over all rows ──► written ──┘

So the loop never sees such a stage: a phase that it trains has a source with the column, and a pipeline without the
stage. The weights of a phase's reference are known before anything is launched (then the role is not), unless they are
the policy's as an earlier phase leaves them.
"""

# pyright: basic
# (transformers is typed in part only)

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from actors.errors import ModelError
from orchestrator.batches.row_table import RowTable
from orchestrator.config.roles import FrozenRole
from orchestrator.config.schema import RunConfig
from orchestrator.data import caches as kept
from orchestrator.data.caches import Origin
from orchestrator.data.source import RowSource, cache_root
from orchestrator.executor import Executor
from orchestrator.pipeline import Stage

if TYPE_CHECKING:
    from orchestrator.planning.prepared import PreparedPhase

MICRO_BATCHES_AT_ONCE = 8  # per rank and call: between two calls the progress is shown
CHUNK_BYTES = 1 << 24

Announce = Callable[[str, dict[str, Any]], None]  # column, where it is from and what it cost
Progress = Callable[[str, float], None]  # column, share of the tokens that are done


def recall(config: RunConfig, model: str, phase: PreparedPhase, began_with: str | None = None) -> PreparedPhase:
    """The phase with every column that is in the cache, of its data and of its held-out rows. `model`: the run's;
    `began_with`: the policy's as the phase found it, once that is known."""
    for stage in phase.pipeline.precomputed:
        weights = _model_of(config, model, phase, stage.role, began_with)
        sources, root = phase.row_sources, cache_root(phase.config.data)
        known = sources and all(kept.any_of(root, _column(stage), s.fingerprint) for s in sources.values())
        if weights is None or not known:  # else a large model would be read for nothing
            continue
        folders = {name: origin.folder(root) for name, origin in _origins(config, phase, stage, weights).items()}
        found = {name: kept.load(folders[name], source.num_tokens) for name, source in sources.items()}
        values = {name: each for name, each in found.items() if each is not None}
        if len(values) == len(found):
            phase = phase.with_precomputed(stage, values, folders.values())
    return phase


async def precompute(
    config: RunConfig,
    model: str,
    phase: PreparedPhase,
    roles: Executor,
    *,
    began_with: str,
    announce: Announce,
    progress: Progress,
) -> PreparedPhase:
    """The phase with every column that is to be there before its first step. The roles must have entered it, with the
    weights that it begins with."""
    phase = await asyncio.to_thread(recall, config, model, phase, began_with)
    for folder in phase.kept:
        announce(folder.parent.parent.name, {"from": "cache", "folder": str(folder)})
    for stage in phase.pipeline.precomputed:
        weights = _model_of(config, model, phase, stage.role, began_with)
        assert weights is not None, "began_with says what is not known before"
        origins = await asyncio.to_thread(_origins, config, phase, stage, weights)
        folders = {name: origin.folder(cache_root(phase.config.data)) for name, origin in origins.items()}
        for name, source in phase.row_sources.items():
            if kept.load(folders[name], source.num_tokens) is not None:
                continue
            began = time.monotonic()
            with kept.writing(folders[name], origins[name], source.num_tokens) as values:
                await _pass(stage, source, roles, values, progress)
            detail = {"from": stage.role, "folder": str(folders[name]), "tokens": source.num_tokens}
            announce(origins[name].column, {**detail, "seconds": round(time.monotonic() - began, 3)})
        written = {name: _written(folders[name], source) for name, source in phase.row_sources.items()}
        phase = phase.with_precomputed(stage, written, folders.values())
    return phase


def _column(stage: Stage) -> str:
    (column,) = stage.writes
    return column


def _written(folder: Path, source: RowSource) -> Any:
    values = kept.load(folder, source.num_tokens)
    assert values is not None, "it was written just now"
    return values


async def _pass(stage: Stage, source: RowSource, roles: Executor, values: Any, progress: Progress) -> None:
    """Every row through the role, in the order of the data set: neighbours in the file are written together."""
    into = _column(stage)
    at_once = MICRO_BATCHES_AT_ONCE * roles.ranks(stage) * roles.phase.token_budget
    progress(into, 0.0)
    for span, batch in source.parts(at_once):
        table, _ = await roles.run([stage], RowTable(batch))
        values[span] = await roles.column(into, table)
        progress(into, span.stop / source.num_tokens)


def _model_of(config: RunConfig, model: str, phase: PreparedPhase, role: str, began_with: str | None) -> str | None:
    """Where a frozen role's weights are: its own model's, or the policy's as the phase finds it. With adapters that is
    the run's model, whatever was trained; None if it is not known yet.

    A role whose weights move during a phase must not come here: `orchestrator.pipeline` refuses it."""
    settings = config.roles.ranks(role)
    own = settings.model
    if own is not None:
        return own
    if phase.index == 0 or config.model.lora is not None:
        return model
    copied = settings.copies if isinstance(settings, FrozenRole) else role
    return began_with and str(Path(began_with) / copied)


def _origins(config: RunConfig, phase: PreparedPhase, stage: Stage, weights: str) -> dict[str, Origin]:
    """What the values of each of the phase's row sources depend on."""
    settings = config.roles.ranks(stage.role)
    by_policy = config.model.lora is not None and settings.model is None
    dtype = config.model.dtype if by_policy else settings.dtype or config.model.dtype
    model = weights_fingerprint(weights)
    return {
        name: Origin(_column(stage), source.fingerprint, model, dtype, phase.temperature)
        for name, source in phase.row_sources.items()
    }


def weights_fingerprint(model: str) -> str:
    """Of the bytes of all files that a model folder is loaded from; of a model on the hub its revision, which names
    them. Raises ModelError for a folder without weights."""
    folder = Path(model)
    if not folder.is_dir():
        return _revision(model)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ModelError(f"{folder} holds neither *.safetensors nor *.bin files, so its weights have no fingerprint")
    digest = xxhash.xxh3_128()
    for file in [folder / "config.json", *sorted(folder.glob("*.py")), *weights]:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def _revision(model: str) -> str:
    """`owner/name@commit`, by the snapshot that the hub's cache holds of it."""
    from transformers.utils.hub import cached_file

    found = cached_file(model, "config.json")
    commit = Path(found).parent.name if found else ""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ModelError(f"{model} does not say which revision it is: download it, and give the folder as its path")
    return f"{model}@{commit}"
