"""Files of a user's own, which the tests write outside of the repository."""

from __future__ import annotations

from pathlib import Path

METHOD = '''
"""DPO with a loss of one's own: the hinge, squared."""

from __future__ import annotations

from beside import margin_of  # a file next to this one

from orchestrator.losses.declare import Loss, Sum, Term
from orchestrator.losses.reduce import item_mean
from orchestrator.losses.views import RefPairs
from orchestrator.pipeline import Pairs, Pipeline, infer, update


def squared_hinge(pairs: RefPairs, *, beta: float) -> Loss:
    """[P]: `max(0, 1 - βd)²`."""
    margin = margin_of(pairs)
    return (1 - beta * margin).clamp(min=0) ** 2, {"margin": pairs.pair_stat(margin)}


def my_method(*, beta: float = 0.1) -> Pipeline:
    """Direct preference optimisation with a squared hinge."""
    return Pipeline(
        Pairs,
        infer("reference", into="ref_logps"),
        update("policy", Sum(Term(squared_hinge, item_mean, options={"beta": beta}))),
    )


def squared(scores, beta: float, *, label_smoothing: float = 0.0):
    """A contrast for `options.loss_type` of dpo."""
    return (1 - label_smoothing - beta * scores.difference).clamp(min=0) ** 2


def no_pipeline():
    return "a pipeline"


def any_options(**options):
    return my_method(**options)


def broken(*, beta: float = 0.1) -> Pipeline:
    return undefined_name


NUMBER = 3
'''

BESIDE = """
from orchestrator.losses.pairwise import pair_scores


def margin_of(pairs):
    return pair_scores(pairs, pairs.logps - pairs.ref_logps).difference
"""

ONLINE = '''
"""REINFORCE with an advantage, a loss, a reward and an engine of one's own."""

import numpy as np
from next_to_it import tenfold

from orchestrator.credit.advantages import credits
from orchestrator.losses.declare import Loss, Sum, Term
from orchestrator.losses.reduce import token_mean
from orchestrator.losses.views import PolicyTokens
from orchestrator.pipeline import Pipeline, Prompts, credit, generate, score, update
from rollout.scripted_engine import ScriptedEngine


def weighted(tokens: PolicyTokens, *, weight: float) -> Loss:
    """[T]: `-w A log π`."""
    loss = -weight * tokens.logps * tokens.advantages
    return loss, {"weighed": tokens.token_stat(tokens.advantages), "tenths": tokens.token_stat(tenfold(loss))}


@credits(reads={"reward"}, writes={"advantages"})
def above_the_mean(table):
    return {"advantages": (table["reward"] - table["reward"].mean()).astype(np.float32)}


def reinforce(*, num_generations: int = 4, weight: float = 1.0) -> Pipeline:
    """REINFORCE against the mean of the batch."""
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward"),
        credit(above_the_mean),
        update("policy", Sum(Term(weighted, token_mean, options={"weight": weight}))),
    )


class Digits(ScriptedEngine):
    """An engine of a user's own; it needs no seconds to start."""


def spread(completions, **columns):
    """Another number for nearly every completion, so that there is something to learn."""
    return [float(sum(map(ord, text)) % 7) for text in completions]
'''

NEXT_TO_IT = """
def tenfold(values):
    return 10 * values
"""


def online(folder: Path) -> Path:
    """The user's file with a method that samples and all that it needs, and the file beside it that it imports."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "next_to_it.py").write_text(NEXT_TO_IT)
    file = folder / "reinforce.py"
    file.write_text(ONLINE)
    return file


def written(folder: Path) -> Path:
    """The user's file with a method and losses, and the file beside it that it imports."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "beside.py").write_text(BESIDE)
    file = folder / "mine.py"
    file.write_text(METHOD)
    return file
