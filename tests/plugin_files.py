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

ENGINE = '''
from rollout.hf_engine import HfEngine


class CountingEngine(HfEngine):
    """An engine that leaves a word of every request that it was given."""

    def add(self, request):
        with open({told!r}, "a") as stream:
            stream.write("asked\\\\n")
        super().add(request)


def spread(completions, **columns):
    """Another number for nearly every completion, so that there is something to learn."""
    return [sum(map(ord, text)) % 7 for text in completions]
'''


def written(folder: Path) -> Path:
    """The user's file with a method and losses, and the file beside it that it imports."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "beside.py").write_text(BESIDE)
    file = folder / "mine.py"
    file.write_text(METHOD)
    return file


def engine(folder: Path, told: Path) -> Path:
    file = folder / "my_engine.py"
    file.write_text(ENGINE.replace("{told!r}", repr(str(told))).replace("\\\\n", "\\n"))
    return file
