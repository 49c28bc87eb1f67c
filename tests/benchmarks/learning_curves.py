"""What each offline method learns: its shipped recipe, run as a user runs it, measured on held-out additions.

    python tests/benchmarks/learning_curves.py [METHOD ...]

Writes `docs/methods/curves/METHOD.png` and prints what was measured where the method's own phase began and ended. Every
recipe `METHOD_arithmetic` runs in one process; the recipes evaluate held-out rows by themselves, and the share of
held-out problems that are answered rightly is measured beside that. About a minute each on two cores.
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

from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.reporting.plot import PANELS, draw

REPOSITORY = Path(__file__).parent.parent.parent
CURVES = REPOSITORY / "docs" / "methods" / "curves"
METHODS = ("sft", "dpo", "cpo", "simpo", "alphapo", "orpo", "tpo", "kto", "bco")
EVERY = 10  # steps between evaluations
DPI = 70  # the pictures are part of the repository
TIMEOUT_S = 1800
COLUMNS = ("answered rightly", "loss", "margin", "right order", "log-probability, chosen", "rejected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS, help=", ".join(METHODS))
    CURVES.mkdir(exist_ok=True)
    table = Table("method", "step", *COLUMNS)
    for method in parser.parse_args().methods:
        with tempfile.TemporaryDirectory() as output:
            folder = run(method, Path(output))
            picture = CURVES / f"{method}.png"
            draw(folder, picture, title=f"{method}_arithmetic", phase=method, panels=_held_out_panels(), dpi=DPI)
            evaluations = [
                line for line in read(folder / METRICS_FILE) if line["phase"] == method and "eval_loss" in line
            ]
        for line in (evaluations[0], evaluations[-1]):
            table.add_row(method, str(line["step"]), *_measured(line))
    Console(width=140).print(table)


def run(method: str, output: Path) -> Path:
    """The folder of a finished run of the method's recipe."""
    phase = "" if method == "sft" else f"phases.{method}."  # the one recipe with its phase at the top level
    overrides = [
        f"output={output}",
        "logging.tensorboard=false",
        "roles.rollout.engine=hf",
        "rewards=[{fn: exact_match}]",
        f"{phase}sampling.max_tokens=5",
        f"{phase}evaluation.every={EVERY if phase else 4 * EVERY}",
        f"{phase}evaluation.data={{path: 'example:arithmetic', split: test}}",
    ]
    command = [Path(sys.executable).parent / "troupe", "run", f"{method}_arithmetic", "--local", *overrides]
    subprocess.run(command, check=True, timeout=TIMEOUT_S, env={**os.environ, "COLUMNS": "140"})
    (folder,) = output.iterdir()
    return folder


def _held_out_panels() -> list[Any]:
    return [panel for panel in PANELS if panel.sparse]


def _measured(line: dict[str, Any]) -> list[str]:
    """In the order of `COLUMNS`; empty where the method has no such number."""
    accuracy, order = line.get("eval_reward"), line.get("eval_rewards/accuracies")
    numbers = [line.get("eval_loss"), line.get("eval_rewards/margins")]
    sides = [line.get(f"eval_logps/{side}") for side in ("chosen", "rejected")]
    share, plain = (lambda x: "" if x is None else f"{x:.1%}"), (lambda x: "" if x is None else f"{x:.3f}")
    return [share(accuracy), *map(plain, numbers), share(order), *map(plain, sides)]


if __name__ == "__main__":
    main()
