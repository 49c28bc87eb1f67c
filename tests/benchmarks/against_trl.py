"""Troupe beside TRL: the same generated model, data, batch, dtype and cores, in turn, on a length-skewed workload.

    python tests/benchmarks/against_trl.py --methods sft dpo --sizes 2.6m --dtypes float32 --rounds 3

One process of each side does all methods of a size and dtype, one after the other; `readme_table.py` makes the README's
table of what this measures. TRL 1.16.0 is installed into an environment of its own (`.cache/trl`) that shares every
other package with this one, so both sides compute with the same torch. Both read one file in the same order, and it is
an error if the two sides count different tokens; where completions are sampled, lengths are equal on average only. What
counts are the ratios: both sides ran on the same machine within minutes. Prints tables after every size and dtype and,
last, one line of JSON.

A step's rows are the same on both sides but for TRL's packing, whose steps have about as many tokens; ratios per token
hold for all. `Ray and rest` is what no phase claims: of Troupe's steps, above all calls and the driver.
"""

from __future__ import annotations

import argparse
import json
import site
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from processes import computes_bfloat16, processor, run
from rich.console import Console
from rich.table import Table
from troupe_run import PHASES, TIMEOUT_S, Figures, around, median, run_troupe
from workload import BATCHING, METHODS, SIZES, Job

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
TRL = "trl==1.16.0"
BATCHINGS = tuple(dict.fromkeys(name for names in BATCHING.values() for name in names))
QUIET = 0.1  # cores that other programs may use without spoiling a comparison


@dataclass(frozen=True)
class Target:
    """At least so many times as fast, per step or per token of text."""

    ratio: float
    per: str


TARGETS = {
    ("grpo", "plain"): Target(3.5, "step"),
    ("sft", "plain"): Target(2.5, "token"),
    ("sft", "group_by_length"): Target(1.2, "token"),
    ("dpo", "plain"): Target(2.5, "token"),
    ("kto", "plain"): Target(2.5, "token"),
    ("gkd", "plain"): Target(4.0, "step"),
    ("on_policy_distillation", "plain"): Target(4.0, "step"),
}


def main() -> None:
    options = _options()
    results: list[Figures] = []
    for size in options.sizes:
        for dtype in options.dtypes:
            jobs = [Job.of(method, size, dtype, options.steps) for method in options.methods]
            results += compare(jobs, options.rounds, options.batching, passive=options.passive)
            show(results)
    print(json.dumps({"benchmark": "against_trl", "trl": TRL, "processor": processor(), "results": results}))


def compare(
    jobs: Sequence[Job], rounds: int, batching: Collection[str] = BATCHINGS, *, passive: bool = False
) -> list[Figures]:
    """One result per job and way in which TRL makes batches: medians of the rounds, in each of which every side runs
    once. The jobs have one size and dtype."""
    python = trl_environment(REPOSITORY / ".cache" / "trl")
    asked = [replace(job, batching=way) for job in jobs for way in BATCHING.get(job.method, ("plain",))]
    asked = [job for job in asked if job.batching in batching]
    theirs: list[list[Figures]] = []
    ours: list[list[Figures]] = []
    for _ in range(rounds):
        theirs.append(run_trl(asked, python, passive=passive))
        ours.append(run_troupe(jobs))
    of_method = {job.method: median([each[at] for each in ours]) for at, job in enumerate(jobs)}
    return [
        _compared(job, median([each[at] for each in theirs]), of_method[job.method]) for at, job in enumerate(asked)
    ]


def _compared(job: Job, trl: Figures, troupe: Figures) -> Figures:
    if job.batching == "plain":
        _same_tokens(job, trl, troupe)
    ratios = {"step": trl["step_s"] / troupe["step_s"], "token": _rate(troupe) / _rate(trl)}
    return {"job": asdict(job), "trl": trl, "troupe": troupe, "ratios": ratios}


def _same_tokens(job: Job, trl: Figures, troupe: Figures) -> None:
    if job.tokens() is not None and trl["tokens"] != troupe["tokens"]:
        raise RuntimeError(
            f"{job.method}: TRL trained on {trl['tokens']} tokens per step, Troupe on {troupe['tokens']}"
        )


def run_trl(jobs: Sequence[Job], python: Path, *, passive: bool) -> list[Figures]:
    with tempfile.TemporaryDirectory() as folder:
        given = [_for_trl(job, Path(folder)) for job in jobs]
        command = [python, "-W", "ignore", HERE / "trl_run.py", json.dumps(given)]
        environment = {"OMP_NUM_THREADS": str(jobs[0].threads), "HF_DATASETS_CACHE": folder}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE"} if passive else {}
        ran = run(command, environment, TIMEOUT_S)
    return [{**figures, **around(ran)} for figures in json.loads(ran.output.strip().splitlines()[-1])]


def _for_trl(job: Job, folder: Path) -> Figures:
    data = folder / f"{job.method}.jsonl"
    job.write(data)
    return {**asdict(job), "items": job.items, "model": str(job.model), "data": str(data), "output": str(folder)}


def trl_environment(folder: Path) -> Path:
    """An environment with TRL of its own and every other package of this one."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        theirs = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
        )
        Path(theirs.stdout.strip(), "shared.pth").write_text("\n".join(site.getsitepackages()))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", TRL], check=True)
        (folder / "ready").touch()
    return python


def _rate(side: Figures) -> float:
    return side["tokens"] / side["step_s"]


def show(results: list[Figures]) -> None:
    console = Console(width=140)
    speed = Table("workload", "TRL batches", "s/step", "", "ratio", "tokens/s", "", "ratio", "target", "padding", "GiB")
    parts = Table("seconds per step", *PHASES[:-1], "Ray and rest", "share of it")
    for result in results:
        job, theirs, ours, ratios = (result[name] for name in ("job", "trl", "troupe", "ratios"))
        name = f"{job['method']} {job['size']} {job['dtype']}"
        speed.add_row(
            name,
            job["batching"],
            *(f"{side['step_s']:.3f}" for side in (theirs, ours)),
            f"{ratios['step']:.2f}x",
            *(f"{_rate(side):,.0f}" for side in (theirs, ours)),
            f"{ratios['token']:.2f}x",
            _verdict(job, ratios),
            " / ".join(f"{side['padding']:.0%}" for side in (theirs, ours)),
            " / ".join(f"{side['peak_gib']:.2f}" for side in (theirs, ours)),
        )
        for label, side in ((f"TRL {job['batching']}", theirs), ("Troupe", ours)):
            seconds = [f"{side['phases'][phase]:.3f}" for phase in PHASES]
            parts.add_row(f"{name}  {label}", *seconds, f"{side['phases']['rest'] / side['step_s']:.1%}")
    console.print(
        "Two figures: TRL's and Troupe's. Padding: share of what goes through the models in training. "
        "GiB: the most that the processes held, over all methods of that size and dtype."
    )
    console.print(speed)
    console.print(parts)
    busy = max(result[side]["others_cores"] for result in results for side in ("trl", "troupe"))
    if busy > QUIET:
        console.print(f"Other programs kept up to {busy:.2f} cores busy during a run: repeat this on a quiet machine.")


def _verdict(job: Figures, ratios: dict[str, float]) -> str:
    target = TARGETS.get((job["method"], job["batching"]))
    if target is None:
        return ""
    return f"{target.ratio:g}x/{target.per} {'met' if ratios[target.per] >= target.ratio else 'MISSED'}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtypes = ["float32", *(["bfloat16"] if computes_bfloat16() else [])]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--dtypes", nargs="+", default=dtypes, help="default: float32, and bfloat16 if the processor has it"
    )
    parser.add_argument("--batching", nargs="+", choices=BATCHINGS, default=list(BATCHINGS), help="TRL's, for sft")
    parser.add_argument(
        "--passive",
        action="store_true",
        help="let TRL's idle threads sleep as Troupe's do: slower on a quiet machine, many times quicker on a busy one",
    )
    parser.add_argument("--rounds", type=int, default=1, help="both sides in turn; medians are shown")
    parser.add_argument("--steps", type=int, help="counted steps per run; default: 8; 6 where completions are sampled")
    return parser.parse_args()


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"took {time.monotonic() - began:.0f} s", file=sys.stderr)
