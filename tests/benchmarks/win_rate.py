"""How often a trained policy beats the one that its last phase began with, by the run's own rewards.

    python tests/benchmarks/win_rate.py RUN [--samples 8]

RUN is the folder of a finished run of several phases. Both policies answer every held-out prompt of the last phase
(`evaluation.data`) with as many samples, drawn as that phase draws them; the i-th samples of the two are compared, and
the higher reward wins. Equal rewards count half for each, so that two equal policies come to 50%. Pairs of which one
could not be scored count nothing. The interval is two standard errors of the prompts' means. One process, `hf` engine.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import ConfigError
from orchestrator.batches.row_table import RowTable
from orchestrator.checkpoint import MODEL, CheckpointStore
from orchestrator.config.loading import load_run
from orchestrator.planning.handover import kept_folder
from orchestrator.planning.prepared import Prepared
from orchestrator.planning.resolve import prepare
from rewards.worker import RewardWorker
from rollout.engine import EngineSpec
from rollout.hf_engine import HfEngine
from rollout.sampling import Request, to_batch

CONTESTANTS = ("start", "end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=8, help="of each policy for each prompt")
    given = parser.parse_args()
    prepared = prepare(load_run(given.run))
    start, end = (
        asyncio.run(rewards_of(prepared, folder, given.samples, seed))
        for seed, folder in enumerate(models(given.run, prepared))
    )
    rate, interval = win_rate(start, end)
    print(f"{len(start)} held-out prompts, {given.samples} samples of each policy")
    for name, rewards in zip(CONTESTANTS, (start, end), strict=True):
        print(f"  {name:<6} mean reward {np.nanmean(rewards):.4f}")
    print(f"  win rate of the end against the start: {rate:.1%} ± {interval:.1%}")


def models(run: Path, prepared: Prepared) -> tuple[Path, Path]:
    """What the last phase began with, and what the run leaves."""
    if len(prepared.phases) < 2 or prepared.phases[-1].evaluation is None:
        raise ConfigError(f"{run}: needs a run of two or more phases, the last one with evaluation.data")
    newest = CheckpointStore(run / "checkpoints", keep=1).latest()
    if newest is None:
        raise ConfigError(f"{run}: has no checkpoint; `troupe resume {run}` goes on with it")
    return kept_folder(run, prepared.phases[-2].name) / MODEL, newest.path / MODEL


async def rewards_of(prepared: Prepared, model: Path, samples: int, seed: int) -> NDArray[np.float64]:
    """[prompts, samples]: rewards of a policy's answers. Policies with different seeds draw independently."""
    phase: Any = prepared.phases[-1]
    engine = HfEngine(EngineSpec("hf", str(model)))
    worker = RewardWorker("reward", prepared.rewards, prepared.tokenizer_path)
    worker.ready()
    found = np.zeros((len(phase.evaluation), samples))
    for index in range(len(phase.evaluation)):
        prompt = phase.evaluation.item(index)
        request = Request(str(index), prompt.tokens, samples, phase.sampling, seed=2 * index + seed)
        engine.add(request)
        finished: list[Any] = []
        while not finished:
            finished = engine.step()
        rows = RowTable(to_batch(request, finished[0].completions)).whole().shard
        found[index] = (await worker.score(rows, prompt.prompt, prompt.columns))[0].total
    return found


def win_rate(start: NDArray[np.float64], end: NDArray[np.float64]) -> tuple[float, float]:
    """The share of pairs that `end` wins, ties half, and two standard errors of it over prompts."""
    wins = np.where(np.isnan(start) | np.isnan(end), np.nan, (end > start) + (end == start) / 2)
    of_prompts = np.nanmean(wins, axis=1)
    return float(np.nanmean(of_prompts)), float(2 * np.nanstd(of_prompts, ddof=1) / np.sqrt(len(of_prompts)))


if __name__ == "__main__":
    main()
