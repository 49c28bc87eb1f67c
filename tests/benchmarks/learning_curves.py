"""What a method learns: its shipped recipe, run as a user runs it, measured on held-out additions.

    python tests/benchmarks/learning_curves.py [--local] [--every N] [METHOD | RECIPE ...]
    python tests/benchmarks/learning_curves.py --run FOLDER METHOD      of a run that has ended

Writes `docs/methods/curves/METHOD.png` and prints what was measured where the method's own phase began and ended; of a
recipe of several phases that count, by its own name, at the end of each. A recipe `METHOD_arithmetic` runs in one
process, or on Ray if an engine of it is vLLM (with --local, the hf engine takes its place). Offline recipes evaluate
held-out rows by themselves; beside that, the share of held-out problems that are answered rightly is measured, if what
is trained answers. A minute to a few each on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import dropwhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from actors.columns import Head
from orchestrator.config.loading import load_config, load_run, recipes
from orchestrator.config.roles import EngineRole
from orchestrator.config.schema import RunConfig
from orchestrator.planning.resolve import build_pipeline
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.reporting.plot import EXPLAINED, KL, PANELS, REWARD, Panel, draw
from tests.judge_server import judge_server

REPOSITORY = Path(__file__).parent.parent.parent
CURVES = REPOSITORY / "docs" / "methods" / "curves"
PREFERENCES = ("dpo", "cpo", "simpo", "alphapo", "orpo", "tpo", "kto", "bco", "reward_model")
OFFLINE = ("sft", *PREFERENCES, "process_reward_model", "gkd")
DISTILLATION = ("on_policy_distillation", "minillm", "gold", "iw_opd", "sdft", "sdpo")
REINFORCE = ("grpo", "gfpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo", "a2po")
SAMPLING = (*REINFORCE, "online_dpo", "xpo", "nash_md")
METHODS = (*OFFLINE, *DISTILLATION, *SAMPLING)
LOOPS = ("sppo", "iterative_dpo", "self_rewarding", "spin", "rso", "constitutional_ai", "rlaif", "distil_then_grpo")
CHAINS = ("online_dpo_judge", "process_supervision", "reward_model_ensemble", "routed_teachers", "mixed_teachers")
RECIPES = (*LOOPS, *CHAINS)  # measured in all of their phases
EVERY = 10  # steps between evaluations
DPI = 70  # the pictures are part of the repository
TIMEOUT_S = 1800
COLUMNS = ("answered rightly", "loss", "margin", "right order", "log-probability, chosen", "rejected")
GRADES = ("exact_match", "accuracy_reward")  # of an answer: 1 if it is right, whatever else is rewarded


def rightly(line: dict[str, Any]) -> float | None:
    """The share of held-out problems that are answered rightly, on lines of evaluations."""
    found = (line[name] for grade in GRADES if (name := f"eval_rewards/{grade}/mean") in line)
    return next(found, None)


RIGHTLY = Panel("held-out problems answered rightly", rightly, sparse=True, goes_on=True, share=True)
OTHERS = [panel for panel in PANELS if panel.sparse and not panel.goes_on]  # without the reward of evaluations
PICTURED = (RIGHTLY, *OTHERS, REWARD, EXPLAINED, KL)  # the last ones where it samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=(*METHODS, *RECIPES), help=", ".join((*METHODS, *RECIPES)))
    parser.add_argument("--local", action="store_true", help="in one process, with the hf engine")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between evaluations; default: %(default)s")
    parser.add_argument("--run", type=Path, help="a run's folder; nothing is run")
    given = parser.parse_args()
    CURVES.mkdir(exist_ok=True)
    table = Table("run", "phase", "step", *COLUMNS)
    for name in given.names:
        with tempfile.TemporaryDirectory() as output:
            folder = given.run or run(name, Path(output), local=given.local, every=given.every)
            lines = read(folder / METRICS_FILE)
            phases = pictured(folder, lines) if name in RECIPES else [name]
            draw(folder, CURVES / f"{name}.png", title=recipe_of(name), phases=phases, panels=PICTURED, dpi=DPI)
            for line in ends_of_phases(lines) if name in RECIPES else began_and_ended(lines, name):
                table.add_row(name, line["phase"], str(line["step"]), *_measured(line))
    Console(width=140).print(table)


def recipe_of(name: str) -> str:
    """The recipe of a method, or of that name."""
    shipped = recipes()
    return name if name in shipped else f"{name}_arithmetic"


def run(name: str, output: Path, *, local: bool, every: int = EVERY) -> Path:
    """The folder of a finished run of a recipe."""
    recipe = recipe_of(name)
    config = load_config(recipe)
    overrides = [f"output={output}", "logging.trackers=[]"]
    if name not in RECIPES:
        overrides += measuring(name, config, every)
    phases = map(build_pipeline, config.phases.values())
    engines = {role for pipeline in phases for role in pipeline.roles if isinstance(config.roles.get(role), EngineRole)}
    slow = sorted(role for role in {*engines, "rollout"} if _engine(config, role) == "vllm")
    if local or not engines:
        overrides += [f"roles.{role}.engine=hf" for role in slow]
    place = ["--local"] if local or not engines or not slow else []
    with ExitStack() as servers:
        for index, reward in enumerate(config.rewards):
            if any(judge.url for judge in reward.judge or ()):  # by its rule, in the place of a model
                server = servers.enter_context(judge_server())
                overrides.append(f"rewards.{index}.judge.url={server.url('v1')}")
        command = [Path(sys.executable).parent / "troupe", "run", recipe, *place, *overrides]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, env={**os.environ, "COLUMNS": "140"})
    (folder,) = output.iterdir()
    return folder


def measuring(method: str, config: RunConfig, every: int = EVERY) -> list[str]:
    """Overrides with which the method's own phase measures what it learns."""
    key = "" if method == "sft" else f"phases.{method}."  # the one recipe with its phase at the top level
    overrides = [f"{key}evaluation.every={every if key else 4 * every}"]
    if Head.VOCABULARY in build_pipeline(config.phases[method]).heads.values():  # what is trained can answer
        overrides += [
            "rewards=[{fn: exact_match}]",
            f"{key}sampling.max_tokens=5",
            f"{key}evaluation.data={{path: 'example:arithmetic', split: test}}",
        ]
    return overrides


def _engine(config: RunConfig, role: str) -> str:
    settings = config.roles.get(role)
    assert isinstance(settings, EngineRole)
    return settings.engine


def pictured(folder: Path, lines: list[dict[str, Any]]) -> list[str]:
    """The phases of a run without what it begins with and what is no curve, and far longer than what is to be seen:
    fine-tuning, and models that are measured once, at their end."""
    phases = load_run(folder, []).phases
    return list(dropwhile(lambda name: phases[name].method == "sft" or _only_at_its_end(lines, name), phases))


def _only_at_its_end(lines: list[dict[str, Any]], phase: str) -> bool:
    own = [line for line in lines if line["phase"] == phase and any(name.startswith("eval_") for name in line)]
    return len(own) == 1 and not began_and_ended(lines, phase)[0]


def ends_of_phases(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last evaluation of each phase that has any."""
    evaluated = [line for line in lines if any(name.startswith("eval_") for name in line)]
    return list({line["phase"]: line for line in evaluated}.values())


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
    return [share(rightly(line)), *numbers, share(order), *map(plain, sides)]


if __name__ == "__main__":
    main()
