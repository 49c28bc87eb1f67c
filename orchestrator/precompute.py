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
from orchestrator.config import RunConfig
from orchestrator.data import kept
from orchestrator.data.kept import Origin
from orchestrator.pipeline import Stage
from orchestrator.roles import Roles
from orchestrator.source import RowSource, cache_root

if TYPE_CHECKING:
    from orchestrator.prepare import PreparedPhase

MICRO_BATCHES_AT_ONCE = 8  # per rank and call: between two calls the progress is shown
CHUNK_BYTES = 1 << 24

Announce = Callable[[str, dict[str, Any]], None]  # column, where it is from and what it cost
Progress = Callable[[str, float], None]  # column, share of the tokens that are done


def recall(config: RunConfig, model: str, phase: PreparedPhase, began_with: str | None = None) -> PreparedPhase:
    """The phase with every column that is in the cache. `model`: the run's; `began_with`: the policy's as the phase
    found it, once that is known."""
    for stage in phase.pipeline.precomputed:
        weights = _model_of(config, model, phase, stage.role, began_with)
        source = phase.source
        if weights is None or not isinstance(source, RowSource):
            continue
        root = cache_root(phase.config.data)
        if kept.any_of(root, stage.options["into"], source.fingerprint):  # else no large model is read for nothing
            folder = _origin(config, phase, stage, weights).folder(root)
            values = kept.load(folder, source.num_tokens)
            phase = phase if values is None else phase.given(stage, values, folder)
    return phase


async def precompute(
    config: RunConfig,
    model: str,
    phase: PreparedPhase,
    roles: Roles,
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
        began, source = time.monotonic(), phase.source
        assert isinstance(source, RowSource), "a stream is refused by the plan"
        weights = _model_of(config, model, phase, stage.role, began_with)
        assert weights is not None, "began_with says what is not known before"
        origin = await asyncio.to_thread(_origin, config, phase, stage, weights)
        folder = origin.folder(cache_root(phase.config.data))
        with kept.writing(folder, origin, source.num_tokens) as values:
            await _pass(stage, source, roles, values, progress)
        written = kept.load(folder, source.num_tokens)
        assert written is not None, "it was written just now"
        phase = phase.given(stage, written, folder)
        seconds = round(time.monotonic() - began, 3)
        detail = {"from": stage.role, "folder": str(folder), "tokens": source.num_tokens, "seconds": seconds}
        announce(origin.column, detail)
    return phase


async def _pass(stage: Stage, source: RowSource, roles: Roles, values: Any, progress: Progress) -> None:
    """Every row through the role, in the order of the data set: neighbours in the file are written together."""
    into = stage.options["into"]
    at_once = MICRO_BATCHES_AT_ONCE * roles.ranks(stage) * roles.phase.token_budget
    progress(into, 0.0)
    for span, batch in source.parts(at_once):
        computed, _ = await roles.run(stage, batch, step=-1)
        values[span] = computed[into]
        progress(into, span.stop / source.num_tokens)


def _model_of(config: RunConfig, model: str, phase: PreparedPhase, role: str, began_with: str | None) -> str | None:
    """Where a frozen role's weights are: its own model's, or the policy's as the phase finds it. With adapters that is
    the run's model, whatever was trained; None if it is not known yet.

    A role whose weights move during a phase must not come here: `orchestrator.pipeline` refuses it."""
    own: str | None = getattr(config.roles, role).model
    if own is not None:
        return own
    return model if phase.index == 0 or config.model.lora is not None else began_with


def _origin(config: RunConfig, phase: PreparedPhase, stage: Stage, weights: str) -> Origin:
    settings = getattr(config.roles, stage.role)
    by_policy = config.model.lora is not None and settings.model is None
    dtype = config.model.dtype if by_policy else settings.dtype or config.model.dtype
    assert isinstance(phase.source, RowSource)
    return Origin(
        stage.options["into"], phase.source.fingerprint, weights_fingerprint(weights), dtype, phase.temperature
    )


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
