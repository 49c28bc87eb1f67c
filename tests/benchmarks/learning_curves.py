"""What a method learns: its shipped recipe, run as a user runs it, measured on held-out additions.

    python tests/benchmarks/learning_curves.py [METHOD ...]

Writes `docs/methods/curves/METHOD.png` and prints what was measured where the method's own phase began and ended. A
recipe `METHOD_arithmetic` runs in one process, or on Ray if the method samples. Offline recipes evaluate held-out rows
by themselves; beside that, the share of held-out problems that are answered rightly is measured, if what is trained
answers. A minute to a few each on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.columns import Head
from orchestrator.config.loading import load_config
from orchestrator.planning.resolve import build_pipeline
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.reporting.plot import EXPLAINED, KL, PANELS, REWARD, draw

REPOSITORY = Path(__file__).parent.parent.parent
CURVES = REPOSITORY / "docs" / "methods" / "curves"
PREFERENCES = ("dpo", "cpo", "simpo", "alphapo", "orpo", "tpo", "kto", "bco", "reward_model")
OFFLINE = ("sft", *PREFERENCES, "process_reward_model", "gkd")
METHODS = (*OFFLINE, "online_dpo", "ppo")
EVERY = 10  # steps between evaluations
DPI = 70  # the pictures are part of the repository
TIMEOUT_S = 1800
COLUMNS = ("answered rightly", "loss", "margin", "right order", "log-probability, chosen", "rejected")
PICTURED = (*(panel for panel in PANELS if panel.sparse), REWARD, EXPLAINED, KL)  # the last ones where it samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS, help=", ".join(METHODS))
    CURVES.mkdir(exist_ok=True)
    table = Table("method", "step", *COLUMNS)
    for method in parser.parse_args().methods:
        with tempfile.TemporaryDirectory() as output:
            folder = run(method, Path(output))
            picture = CURVES / f"{method}.png"
            draw(folder, picture, title=f"{method}_arithmetic", phase=method, panels=PICTURED, dpi=DPI)
            for line in began_and_ended(read(folder / METRICS_FILE), method):
                table.add_row(method, str(line["step"]), *_measured(line))
    Console(width=140).print(table)


def run(method: str, output: Path) -> Path:
    """The folder of a finished run of the method's recipe."""
    recipe = f"{method}_arithmetic"
    phase = load_config(recipe).phases[method]
    key = "" if method == "sft" else f"phases.{method}."  # the one recipe with its phase at the top level
    overrides = [
        f"output={output}",
        "logging.trackers=[]",
        f"{key}evaluation.every={EVERY if key else 4 * EVERY}",
    ]
    pipeline = build_pipeline(phase)
    if Head.VOCABULARY in pipeline.heads.values():  # what is trained can answer
        overrides += [
            *([] if pipeline.generates else ["roles.rollout.engine=hf"]),
            "rewards=[{fn: exact_match}]",
            f"{key}sampling.max_tokens=5",
            f"{key}evaluation.data={{path: 'example:arithmetic', split: test}}",
        ]
    place = [] if pipeline.generates else ["--local"]
    command = [Path(sys.executable).parent / "troupe", "run", recipe, *place, *overrides]
    subprocess.run(command, check=True, timeout=TIMEOUT_S, env={**os.environ, "COLUMNS": "140"})
    (folder,) = output.iterdir()
    return folder


def began_and_ended(lines: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    """The evaluations with which a phase began and ended. What began it may have been measured as the end of the one
    before it."""
    own = [line for line in lines if line["phase"] == phase]
    first, last = min(line["step"] for line in own), max(line["step"] for line in own)
    evaluated = [line for line in lines if any(name.startswith("eval_") for name in line)]
    ends = ([line for line in evaluated if line["step"] in steps] for steps in ((first - 1, first), (last,)))
    return [{name: value for line in at for name, value in line.items()} for at in ends]


def _measured(line: dict[str, Any]) -> list[str]:
    """In the order of `COLUMNS`; empty where the method has no such number."""
    margin, order = (
        line.get(f"eval_rewards/{pairs}", line.get(f"eval_{scores}"))
        for pairs, scores in (("margins", "margin"), ("accuracies", "accuracy"))
    )
    sides = [line.get(f"eval_logps/{side}") for side in ("chosen", "rejected")]
    share, plain = (lambda x: "" if x is None else f"{x:.1%}"), (lambda x: "" if x is None else f"{x:.3f}")
    numbers = map(plain, (line.get("eval_loss"), margin))
    return [share(line.get("eval_reward")), *numbers, share(order), *map(plain, sides)]


if __name__ == "__main__":
    main()
