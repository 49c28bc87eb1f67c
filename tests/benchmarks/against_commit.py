"""A step of this checkout beside a step of another commit, in turn: whether a change made Troupe slower.

    python tests/benchmarks/against_commit.py COMMIT --methods grpo sft --sizes 2.6m --rounds 3

The other commit is checked out beside this one for as long as the benchmark runs; both use the packages that are
installed here. What counts are the ratios: both sides ran within minutes on the same machine. Prints a table
after every size and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from processes import processor
from rich.console import Console
from rich.table import Table
from troupe_run import PHASES, Figures, median, run_troupe
from workload import METHODS, SIZES, Job

REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    options = _options()
    results: list[Figures] = []
    with checked_out(options.commit) as other:
        for size in options.sizes:
            jobs = [Job.of(method, size, options.dtype, options.steps) for method in options.methods]
            results += compare(jobs, other, options.rounds)
            show(results, options.commit)
    print(
        json.dumps(
            {"benchmark": "against_commit", "commit": options.commit, "processor": processor(), "results": results}
        )
    )


def compare(jobs: Sequence[Job], other: Path, rounds: int) -> list[Figures]:
    """Medians of both sides, which take turns; one run of each side has all jobs."""
    theirs: list[list[Figures]] = []
    ours: list[list[Figures]] = []
    for _ in range(rounds):
        theirs.append(run_troupe(jobs, other))
        ours.append(run_troupe(jobs))
    found: list[Figures] = []
    for at, job in enumerate(jobs):
        before, now = (median([figures[at] for figures in side]) for side in (theirs, ours))
        found.append({"job": asdict(job), "before": before, "now": now, "ratio": now["step_s"] / before["step_s"]})
    return found


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkout"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def show(results: list[Figures], commit: str) -> None:
    table = Table("workload", f"s/step {commit}", "s/step now", "now / before", *PHASES, "others' cores")
    for result in results:
        job, before, now = result["job"], result["before"], result["now"]
        table.add_row(
            f"{job['method']} {job['size']} {job['dtype']}",
            f"{before['step_s']:.3f}",
            f"{now['step_s']:.3f}",
            f"{result['ratio']:.2f}",
            *(f"{before['phases'][phase]:.3f} / {now['phases'][phase]:.3f}" for phase in PHASES),
            f"{before['others_cores']:.2f} / {now['others_cores']:.2f}",
        )
    Console(width=170).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what this checkout is compared with")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grpo", "sft"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="both sides in turn; medians are shown")
    parser.add_argument("--steps", type=int, help="counted steps per run; default: 8, of grpo 6")
    return parser.parse_args()


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"took {time.monotonic() - began:.0f} s", file=sys.stderr)
