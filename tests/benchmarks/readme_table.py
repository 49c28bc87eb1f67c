"""The README's table of Troupe beside TRL, in Markdown, and the whole learning run of `make demo`, part by part.

    python tests/benchmarks/readme_table.py                         # every part
    python tests/benchmarks/readme_table.py 26m-float32 learning    # some; what was measured earlier stays in the table

Results are kept in a file, and the table is printed of all that are in it. Leave the machine alone meanwhile: the table
says how many cores other programs used. Three rounds of the float32 parts and the learning run take about 12 minutes on
two cores. The parts in bfloat16 are left out where the processor has no instructions for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from against_trl import QUIET, REPOSITORY, TARGETS, compare
from learning_run import learning
from processes import computes_bfloat16, processor
from troupe_run import Figures
from workload import METHODS, Job

LEARNING = "learning"  # the part that is no comparison of steps
NAMES = {"packing": "packing (bfd)", "group_by_length": "group by length"}
LATEST = REPOSITORY / ".cache" / "readme_table.json"


@dataclass(frozen=True)
class Part:
    """Methods of one size and dtype, with so many counted steps each (where completions are sampled, half of them)."""

    size: str
    dtype: str
    methods: tuple[str, ...]
    steps: int

    def jobs(self) -> list[Job]:
        jobs = [Job.of(method, self.size, self.dtype, self.steps) for method in self.methods]
        return [
            job if job.tokens() is not None else Job.of(job.method, self.size, self.dtype, job.steps // 2)
            for job in jobs
        ]


PARTS = {
    "2.6m-float32": Part("2.6m", "float32", METHODS, 6),
    "2.6m-bfloat16": Part("2.6m", "bfloat16", ("sft", "grpo"), 6),
    "26m-float32": Part("26m", "float32", ("sft", "grpo"), 4),
    "26m-bfloat16": Part("26m", "bfloat16", ("sft", "grpo"), 4),
}


def main() -> None:
    options = _options()
    for name in options.parts:
        began = time.monotonic()
        found = learning() if name == LEARNING else compare(PARTS[name].jobs(), options.rounds)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        _keep(options.results, name, {"date": str(date.today()), "rounds": options.rounds, "found": found})
    print(markdown(json.loads(options.results.read_text())))


def markdown(parts: Figures) -> str:
    shown = [name for name in PARTS if name in parts]
    lines = [
        "| workload | TRL's batches | TRL s/step | Troupe s/step | per step | per token | padding, TRL |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(result) for name in shown for result in parts[name]["found"]]
    measured = [f"{name} on {parts[name]['date']}, {parts[name]['rounds']} round(s)" for name in shown]
    lines += ["", f"{processor()}; bold: the target is met. Measured: {'; '.join(measured)}."]
    used = [
        result[side]["others_cores"] for name in shown for result in parts[name]["found"] for side in ("trl", "troupe")
    ]
    if LEARNING in parts:
        found = parts[LEARNING]["found"]
        used.append(found["others_cores"])
        lines.append(
            f"The whole learning run of `make demo`: {found['seconds']:.0f} s from the command to its end, accuracy "
            f"{found['before']:.2f} to {found['after']:.2f}."
        )
    busy = max(used, default=0.0)
    lines.append(f"Other programs used up to {busy:.2f} cores{': repeat this on a quiet machine' * (busy > QUIET)}.")
    return "\n".join(lines)


def _row(result: Figures) -> str:
    job, trl, troupe, ratios = (result[name] for name in ("job", "trl", "troupe", "ratios"))
    target = TARGETS.get((job["method"], job["batching"]))

    def ratio(per: str) -> str:
        met = target is not None and target.per == per and ratios[per] >= target.ratio
        return f"**{ratios[per]:.2f}x**" if met else f"{ratios[per]:.2f}x"

    plain = job["batching"] == "plain"
    cells = [
        f"`{job['method']}` {job['size'].upper()} {job['dtype']}" if plain else "",
        NAMES.get(job["batching"], job["batching"]),
        f"{trl['step_s']:.3f}",
        f"{troupe['step_s']:.3f}",
        ratio("step"),
        ratio("token"),
        f"{trl['padding']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _keep(file: Path, name: str, found: Figures) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**parts, name: found}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PARTS, LEARNING]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}; default: all that apply")
    parser.add_argument("--rounds", type=int, default=3, help="both sides in turn; medians are shown")
    parser.add_argument("--results", type=Path, default=LATEST, help="where they are kept; default: %(default)s")
    options = parser.parse_args()
    options.parts = options.parts or [
        name for name in names if name == LEARNING or PARTS[name].dtype == "float32" or computes_bfloat16()
    ]
    if unknown := set(options.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


if __name__ == "__main__":
    main()
