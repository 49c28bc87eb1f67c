"""The objective that a trainer executes: losses with their reductions, made from an update stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.columns import COLUMNS, Head
from actors.errors import ConfigError
from actors.imports import torch
from actors.objective import DIVERGENCE, Counts, MicroBatch, OfLogits, Outputs, Stat, World
from orchestrator.losses.declare import LossFunction, Term, terms_of
from orchestrator.losses.reduce import Reduction
from orchestrator.losses.views import View
from orchestrator.pipeline import Stage

if TYPE_CHECKING:
    from torch import Tensor


class LossObjective:
    """`actors.objective.Objective` from a loss (or a `Sum` of them), its reduction and its options.

    Pickles by reference: every function in it lives in a module. Terms are numbered in `counts`, in `statistics` and in
    the state, so two terms with the same loss stay separate.
    """

    def __init__(self, loss: LossFunction, reduce: Reduction | None, options: Mapping[str, Any]) -> None:
        self.terms = terms_of(loss, reduce, options)
        names = frozenset[str]().union(*(term.reads for term in self.terms))
        self.columns = names & frozenset(COLUMNS)
        self.needs = names - self.columns - {DIVERGENCE}
        self.of_logits = _the_comparison(self.terms)
        self.head = _the_only_head(self.terms)
        self.keep_groups = any(term.view.keep_groups for term in self.terms)
        couplings = [term.coupling for term in self.terms if term.coupling is not None]
        self.coupled = bool(couplings)
        self.statistics_rows = _the_one({coupling.over for coupling in couplings})

    @classmethod
    def of(cls, stage: Stage) -> LossObjective:
        """The objective of an update stage."""
        assert stage.call is not None, f"{stage.name} optimises nothing"
        return cls(stage.call, stage.options["reduce"], stage.options["loss_options"])

    def counts(self, micro: MicroBatch) -> Counts:
        return {str(index): term.reduce.count(term.view, micro) for index, term in enumerate(self.terms)}

    def statistics(
        self, micros: list[MicroBatch], outputs: list[Outputs], world: World, state: dict[str, Any]
    ) -> dict[str, Any]:
        """The result of each coupled term's statistics function, without gradient; each has its own state."""
        found: dict[str, Any] = {}
        for index, term in enumerate(self.terms):
            if term.coupling is not None:
                views = [_view(term, micro, output, {}) for micro, output in zip(micros, outputs, strict=True)]
                own = state.setdefault(str(index), {})
                statistics = term.coupling.statistics
                with torch.no_grad():
                    found[str(index)] = statistics(views, world, own, **term.named(statistics))
        return found

    def loss(
        self, micro: MicroBatch, outputs: Outputs, counts: Counts, statistics: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Stat]]:
        total = outputs.main.new_zeros(())
        metrics: dict[str, Stat] = {}
        for index, term in enumerate(self.terms):
            view = _view(term, micro, outputs, statistics.get(str(index), {}))
            values, found = term.loss(view, **term.options)
            total = total + term.weight * term.reduce(values, view, counts[str(index)])
            metrics |= found
        return total, {"loss": Stat(total.detach(), combine="sum"), **metrics}


def _view(term: Term, micro: MicroBatch, outputs: Outputs, shared: Mapping[str, Tensor]) -> View:
    return term.view.of(micro, outputs, term.reads, shared)


def _the_only_head(terms: tuple[Term, ...]) -> Head:
    """The head that all terms of a sum need; they share one forward pass."""
    heads = {term.view.head for term in terms}
    if len(heads) != 1:
        raise ConfigError(f"the losses of one sum need models with different heads ({', '.join(sorted(heads))})")
    return heads.pop()


def _the_comparison(terms: tuple[Term, ...]) -> OfLogits | None:
    """The comparison of whole distributions; at most one term may have one, because it is computed once."""
    found = [(term, comparison) for term in terms if (comparison := term.of_logits) is not None]
    if len(found) > 1:
        named = ", ".join(term.loss.__name__ for term, _ in found)
        raise ConfigError(f"losses of one sum compare whole distributions in several ways ({named}); use one of them")
    return found[0][1] if found else None


def _the_one(columns: set[str | None]) -> str | None:
    """The rows over which all statistics of an objective are computed; a row cannot be left out for one term only."""
    if len(columns) > 1:
        named = ", ".join(sorted(column or "all rows" for column in columns))
        raise ConfigError(f"losses of one sum have statistics over different rows ({named}); use one of them at a time")
    return next(iter(columns), None)
