"""Step time against `max_staleness` 0, 1 and 2: answers of one length, a slow reward, a few long answers.

    python tests/benchmarks/staleness.py [--steps 10] [--workloads plain reward tail]

One process on this machine. The policy is a small model that is really trained. The engine is the scripted one, which
takes a fixed time for each token of a step, as a GPU of its own would, and leaves the processor to training: a first
run measures what a training step costs, and the engine's time per token is set so that generation costs the same.
The reward sleeps, as a judge does that is asked over the network: as long as half a generation in `reward`, else not.
`tail`: one answer in sixteen is eight times as long as the others, and a batch ends with the last of its answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.config.loading import load_config
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.benchmarks.reward_overlap import REWARD

WARM_UP = 3  # steps that are left out: the pipeline fills, and torch warms up
GROUPS, SAMPLES = 32, 4
SHORT, LONG = 8, 64


@dataclass(frozen=True)
class Workload:
    """`reward`: seconds of the reward, as a share of a generation's. `lengths`: of answers, each as likely."""

    name: str
    lengths: tuple[int, ...]
    reward: float = 0.0

    @property
    def tokens(self) -> int:
        """Steps of the engine until the last answer of a batch has ended."""
        return max(self.lengths)


WORKLOADS = {
    each.name: each
    for each in (
        Workload("plain", (SHORT * 2,)),
        Workload("reward", (SHORT * 2,), reward=0.5),
        Workload("tail", (*(SHORT,) * 15, LONG)),
    )
}


@dataclass(frozen=True)
class Measured:
    """Medians of the steps, in seconds."""

    step: float
    update: float
    collect: float
    publish: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="that are measured")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    given = parser.parse_args()
    print("workload   training   generation   reward     0          1                2          (s a step)")
    for name in given.workloads:
        workload = WORKLOADS[name]
        with tempfile.TemporaryDirectory() as folder:
            alone = measured(Path(folder), workload, 0, given.steps, per_token_s=0.0)
            generation = alone.step  # all of it is training: generation takes no time
            per_token_s = generation / workload.tokens
            found = [measured(Path(folder), workload, each, given.steps, per_token_s=per_token_s) for each in range(3)]
        sync = found[0].step
        cells = [f"{sync:6.2f}"] + [f"{each.step:6.2f} ({sync / each.step:4.2f}x)" for each in found[1:]]
        parts = f"{alone.step:8.2f} {generation:12.2f} {generation * workload.reward:8.2f}"
        print(f"{name:9s} {parts}  {'   '.join(cells)}", flush=True)
        for staleness, each in enumerate(found):
            shares = f"update {each.update:.2f}, collect {each.collect:.2f}, publish {each.publish:.2f}"
            print(f"          {staleness}: {shares}")


def measured(folder: Path, workload: Workload, staleness: int, steps: int, *, per_token_s: float) -> Measured:
    where = folder / f"{staleness}-{per_token_s:g}"
    where.mkdir()
    (where / "mine.py").write_text(REWARD)
    seconds = workload.reward * per_token_s * workload.tokens
    recipe: dict[str, Any] = {
        "name": "staleness",
        "output": str(where),
        "model": {"path": "example:arithmetic"},
        "method": "grpo",
        "options": {"num_generations": SAMPLES, **({"correction": "token_truncate"} if staleness else {})},
        "data": {"path": "example:arithmetic"},
        "train": {"steps": steps + WARM_UP, "batch_size": GROUPS, "max_staleness": staleness},
        "sampling": {"max_tokens": LONG + 1},
        "rewards": [{"fn": f"{where}/mine.py:slow", "options": {"seconds": seconds}}],
        "roles": {
            "rollout": {
                "engine": "scripted",
                "max_concurrency": GROUPS * SAMPLES,
                "engine_options": {"seconds_per_step": per_token_s, "lengths": list(workload.lengths)},
            },
            "reward": {"concurrency": 4 * GROUPS},
        },
        "weights": {"transport": "disk"},
        "logging": {"trackers": [], "completions_every": None},
    }
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ended = run(load_config(where / "recipe.yaml"), local=True)
    lines = [line for line in read(ended.folder / METRICS_FILE) if "step_time" in line][WARM_UP:]

    def median(*names: str) -> float:
        return float(np.median([sum(line.get(name, 0.0) for name in names) for line in lines]))

    parts = median("time/policy.update"), median("time/collect"), median("time/publish")
    return Measured(median("step_time"), *parts)


if __name__ == "__main__":
    main()
