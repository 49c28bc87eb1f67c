"""How much of a slow reward's time is hidden behind generation: step time with a reward of d seconds against none.

    python tests/benchmarks/reward_overlap.py [--seconds 0.5 1 2] [--steps 10]

One process on this machine. The policy is a small model that is really trained; the engine is the scripted one, which
takes a fixed time for each token, so that generation takes equally long in all runs and the processor is left to
training. A batch is 16 groups of 4, of which the engine decodes 8 at a time. The reward sleeps, as a judge that is
asked over the network does. `sync`: `max_staleness` 0, where only the groups of the same batch can hide it; `async`:
`max_staleness` 2, with the next batches under way meanwhile. "After generation" is what a program would take that
scores a batch when all of it is generated.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.config.loading import load_config
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run

WARM_UP = 3  # steps that are left out: the pipeline fills, and torch warms up
REWARD = """
import asyncio

async def slow(completion_ids, seconds=0.0):
    await asyncio.sleep(seconds)
    return [float(len(ids) % 7) for ids in completion_ids]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="of the reward")
    parser.add_argument("--steps", type=int, default=10, help="that are measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            (seconds, staleness): step_seconds(Path(folder), seconds, staleness, given.steps)
            for seconds in (0.0, *given.seconds)
            for staleness in (0, 2)
        }
    print(f"median of {given.steps} steps")
    print("reward     after generation   sync              async")
    for seconds in (0.0, *given.seconds):
        none = found[0.0, 0]
        cells = [f"{none + seconds:6.2f} s  {1 + seconds / none:5.2f}x "]
        cells += [f"{found[seconds, each]:6.2f} s  {found[seconds, each] / found[0.0, each]:5.2f}x " for each in (0, 2)]
        print(f"{seconds:4.1f} s     {'  '.join(cells)}")


def step_seconds(folder: Path, seconds: float, staleness: int, steps: int) -> float:
    """The median time of a step."""
    where = folder / f"{seconds:g}-{staleness}"
    where.mkdir()
    (where / "mine.py").write_text(REWARD)
    recipe: dict[str, Any] = {
        "name": "overlap",
        "output": str(where),
        "model": {"path": "example:arithmetic"},
        "method": "grpo",
        "options": {"num_generations": 4, **({"correction": "token_truncate"} if staleness else {})},
        "data": {"path": "example:arithmetic"},
        "train": {"steps": steps + WARM_UP, "batch_size": 16, "max_staleness": staleness},
        "sampling": {"max_tokens": 8},
        "rewards": [{"fn": f"{where}/mine.py:slow", "options": {"seconds": seconds}}],
        "roles": {
            "rollout": {"engine": "scripted", "max_concurrency": 32, "engine_options": {"seconds_per_step": 0.1}},
            "reward": {"concurrency": 64},
        },
        "weights": {"transport": "disk"},
        "logging": {"trackers": [], "completions_every": None},
    }
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ended = run(load_config(where / "recipe.yaml"), local=True)
    lines = [line["step_time"] for line in read(ended.folder / METRICS_FILE) if "step_time" in line]
    return float(np.median(lines[WARM_UP:]))


if __name__ == "__main__":
    main()
