"""How a loss declares what it reads, and how losses are summed.

A loss is `loss(view, *, option=..., ...) -> (values, metrics)`. The type of its view declares what it always reads: a
field named like a column of the batch, or like an extra of the forward pass. Fields that it reads only under some
options are declared with these options:

    @reads("ref_logps", beta=is_on)
    def clipped(tokens: PolicyTokens, *, beta: float = 0.0) -> Loss: ...

These two declarations determine the columns that a pipeline must provide, the roles that are launched to write them,
and what the forward pass computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from actors.columns import COLUMNS, Head
from actors.errors import ConfigError
from actors.objective import EXTRAS, OfLogits, Stat
from orchestrator.losses.reduce import Reduction
from orchestrator.losses.views import View

if TYPE_CHECKING:
    from torch import Tensor

Loss = tuple["Tensor", dict[str, Stat]]  # unreduced values ([T] tokens, [B] rows or [P] pairs), and metrics
LossFunction = Callable[..., Loss]
Statistics = Callable[..., dict[str, "Tensor"]]
Decorated = TypeVar("Decorated", bound=Callable[..., Any])

FORWARD_OPTIONS = frozenset({"all_tokens", "entropy_grad"})  # `all_tokens`: prompts have log-probabilities, too


def is_on(value: Any) -> bool:
    """The condition of most options: the value has an effect."""
    return value not in (None, 0, False, "none")


@dataclass(frozen=True)
class Read:
    """Names that a loss reads if every option satisfies its condition: a predicate, or the value that it must equal."""

    names: frozenset[str]
    conditions: Mapping[str, Any]

    def applies(self, options: Mapping[str, Any]) -> bool:
        return all(
            wanted(options[name]) if callable(wanted) else options[name] == wanted
            for name, wanted in self.conditions.items()
        )


def reads(*names: str, **conditions: Any) -> Callable[[Decorated], Decorated]:
    """Declares that a loss reads columns or extras, or needs options of the forward pass, if its own options satisfy
    the conditions."""
    if unknown := set(names) - COLUMNS.keys() - set(EXTRAS) - FORWARD_OPTIONS:
        raise ValueError(f"@reads names {sorted(unknown)}, which is neither a column nor an extra of the forward pass")

    def declare(loss: Decorated) -> Decorated:
        loss.__dict__["reads"] = (*loss.__dict__.get("reads", ()), Read(frozenset(names), conditions))
        return loss

    return declare


@dataclass(frozen=True)
class Coupling:
    """Statistics over all rows, or over those that the column `over` marks."""

    statistics: Statistics
    over: str | None
    when: Read


def couples(statistics: Statistics, *, over: str | None = None, **conditions: Any) -> Callable[[Decorated], Decorated]:
    """Declares that a loss needs statistics over rows: `statistics(views, world, state, **options)` runs before any
    gradient, on all micro-batches of all ranks, and its result is the view's `shared`. It is called with those options
    of the loss that it has as parameters.

    `over`: a boolean column. The statistics are then computed over the rows where it is true, and the loss over the
    other rows only."""

    def declare(loss: Decorated) -> Decorated:
        names = frozenset({over}) if over is not None else frozenset[str]()
        loss.__dict__["couples"] = Coupling(statistics, over, Read(names, conditions))
        return loss

    return declare


@dataclass(frozen=True)
class Comparison:
    """How a loss compares whole distributions: `call`, with the columns of the batch that it takes."""

    call: Callable[..., Tensor]
    columns: tuple[str, ...]
    companion: bool
    width: int


def compares(
    call: Callable[..., Tensor], *columns: str, companion: bool = False, width: int = 1
) -> Callable[[Decorated], Decorated]:
    """Declares the function that computes a loss's `divergence`: `call(logits [n, V], *given, **options) -> [n]`, or
    [n, width], in float32, computed for a chunk of tokens at a time. `given`: with `companion`, that model's logits
    [n, V], then the entries of `columns`. It is called with those options of the loss that it has as parameters; a
    `temperature` of None is that at which the phase takes log-probabilities."""

    def declare(loss: Decorated) -> Decorated:
        loss.__dict__["compares"] = Comparison(call, columns, companion, width)
        return reads(*columns)(loss)

    return declare


@dataclass(frozen=True)
class Term:
    """One loss with its reduction, its weight in a sum, and its options."""

    loss: LossFunction
    reduce: Reduction
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def view(self) -> type[View]:
        return view_of(self.loss)

    @cached_property
    def reads(self) -> frozenset[str]:
        """Columns, extras and options of the forward pass that this loss reads under these options."""
        return _reads(self.loss, self.options)

    @property
    def coupling(self) -> Coupling | None:
        """The loss's statistics over rows under these options; None if it has none."""
        coupling: Coupling | None = self.loss.__dict__.get("couples")
        return coupling if coupling and coupling.when.applies(_bound(self.loss, self.options)) else None

    @property
    def of_logits(self) -> OfLogits | None:
        """The loss's comparison of distributions under these options; None if it has none."""
        found: Comparison | None = self.loss.__dict__.get("compares")
        return found and OfLogits(found.call, self.named(found.call), found.columns, found.companion, found.width)

    def named(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Those of this term's options, with defaults, that are parameters of `function`."""
        known = _signature(function).parameters
        return {name: value for name, value in _bound(self.loss, self.options).items() if name in known}


class Sum:
    """A weighted sum of losses, each with a reduction and options of its own. Terms of weight 0 are left out."""

    def __init__(self, *terms: Term) -> None:
        self.terms = tuple(term for term in terms if term.weight)

    def __call__(self, *args: Any, **kwargs: Any) -> Loss:
        raise TypeError("a Sum of losses is executed by LossObjective, term by term")


def terms_of(loss: LossFunction, reduce: Reduction | None, options: Mapping[str, Any]) -> tuple[Term, ...]:
    """The terms of a sum, or a plain loss as the only term."""
    if isinstance(loss, Sum):
        if reduce is not None or options:
            raise ConfigError("the terms of a Sum have their own reductions and options; give none to the sum")
        return loss.terms
    if reduce is None:
        raise ConfigError(f"the loss {loss.__name__} needs a reduction: update(role, loss, reduce=...)")
    return (Term(loss, reduce, 1.0, options),)


def columns_of(loss: LossFunction, options: Mapping[str, Any]) -> frozenset[str]:
    """Batch columns that a loss reads under these options, besides tokens."""
    return _all_reads(loss, options) & frozenset(COLUMNS)


def head_of(loss: LossFunction) -> Head:
    """The head of the models that a loss is for; for a sum, that of its first term."""
    return (loss.terms[0].view if isinstance(loss, Sum) else view_of(loss)).head


def has_companion(loss: LossFunction) -> bool:
    """Whether a loss compares the trained model with a companion."""
    losses = [term.loss for term in loss.terms] if isinstance(loss, Sum) else [loss]
    found = [each.__dict__.get("compares") for each in losses]
    return any(each is not None and each.companion for each in found)


@cache
def view_of(loss: LossFunction) -> type[View]:
    """The type of a loss's view: the annotation of its first parameter."""
    annotation = next(iter(inspect.signature(loss).parameters.values())).annotation
    return eval(annotation, inspect.unwrap(loss).__globals__) if isinstance(annotation, str) else annotation


def _all_reads(loss: LossFunction, options: Mapping[str, Any]) -> frozenset[str]:
    if isinstance(loss, Sum):
        return frozenset().union(*(term.reads for term in loss.terms))
    return _reads(loss, options)


def _reads(loss: LossFunction, options: Mapping[str, Any]) -> frozenset[str]:
    bound = _bound(loss, options)
    declared: tuple[Read, ...] = loss.__dict__.get("reads", ())
    coupling: Coupling | None = loss.__dict__.get("couples")
    declared += (coupling.when,) if coupling else ()
    return view_of(loss).always_reads().union(*(read.names for read in declared if read.applies(bound)))


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _bound(loss: LossFunction, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the signature's defaults filled in. Raises ConfigError for one that the loss does not take."""
    try:
        bound = _signature(loss).bind(None, **options)
    except TypeError as error:
        raise ConfigError(f"the loss {loss.__name__}: {error}") from None
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])
