"""The whole learning run of `make demo`, from the command to its end: seconds by activity, steps by phase, accuracy.

    python tests/benchmarks/learning_run.py
    python tests/benchmarks/learning_run.py --against COMMIT --rounds 2 phases.sft.train.steps=30

With `--against`, the same run of another commit, in turn; both use the packages that are installed here. Its steps are
of short samples: 512 of up to 5 tokens. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from against_commit import checked_out
from processes import processor, run
from rich.console import Console
from rich.table import Table
from troupe_run import HERE, TIMEOUT_S
from troupe_run import median as medians

RECIPE = "grpo_arithmetic"
WARMUP = 3  # steps of a phase that are not counted
Figures = dict[str, Any]


def learning(changes: tuple[str, ...] = (), checkout: Path = HERE.parent.parent) -> Figures:
    """One run. `checkout`: of Troupe's source; `changes`: of the recipe, as `key=value`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).parent / "troupe", "run", RECIPE, f"output={folder}", *changes]
        began = time.monotonic()
        ran = run(command, {"PYTHONPATH": str(checkout)}, TIMEOUT_S)
        seconds = time.monotonic() - began
        (of_run,) = Path(folder).glob("*-*")
        return {"seconds": seconds, **figures(of_run), "others_cores": ran.others_cores}


def figures(folder: Path) -> Figures:
    """What the files of a run say of it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    scores = [line["eval_reward"] for line in lines if "eval_reward" in line]
    steps = [line for line in lines if "step_time" in line]
    return {
        "before": scores[0],
        "after": scores[-1],
        "activities": next(event["seconds"] for event in reversed(events) if event["event"] == "finished"),
        "steps": {
            phase: _step([line for line in steps if line["phase"] == phase][WARMUP:])
            for phase in dict.fromkeys(line["phase"] for line in steps)
        },
    }


def _step(steps: list[Figures]) -> Figures:
    """Medians of a phase's steps, in seconds."""
    parts = [name for name in steps[0] if name.startswith("time/")]
    return {name.removeprefix("time/"): median(line.get(name, 0.0) for line in steps) for name in ("step_time", *parts)}


def show(sides: dict[str, Figures]) -> None:
    table = Table("seconds", *sides)
    table.add_row("command to end", *(f"{side['seconds']:.1f}" for side in sides.values()))
    first = next(iter(sides.values()))
    for name in first["activities"]:
        table.add_row(name, *(f"{side['activities'].get(name, 0.0):.1f}" for side in sides.values()))
    for phase, step in first["steps"].items():
        for name in step:
            table.add_row(
                f"{phase}: {name}", *(f"{side['steps'][phase].get(name, 0.0):.3f}" for side in sides.values())
            )
    table.add_row("accuracy", *(f"{side['before']:.2f} to {side['after']:.2f}" for side in sides.values()))
    table.add_row("others' cores", *(f"{side['others_cores']:.2f}" for side in sides.values()))
    Console(width=120).print(table)


def main() -> None:
    options = _options()
    found: dict[str, list[Figures]] = {}
    with checked_out(options.against) if options.against else nullcontext() as other:
        for _ in range(options.rounds):
            if other is not None:
                found.setdefault(options.against, []).append(learning(tuple(options.changes), other))
            found.setdefault("now", []).append(learning(tuple(options.changes)))
    sides = {name: medians(runs) for name, runs in found.items()}
    show(sides)
    print(json.dumps({"benchmark": "learning_run", "processor": processor(), "results": sides}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--against", metavar="COMMIT", help="run this commit, too")
    parser.add_argument("--rounds", type=int, default=1, help="both sides in turn; medians are shown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
