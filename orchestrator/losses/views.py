"""Typed views of one micro-batch and its forward pass: the inputs of losses.

The type of a loss's view declares what the loss reads. A field that is named like a column of the batch
(`actors/columns.py`) or like an extra of the forward pass (`actors.objective.EXTRAS`) is filled from there. A field
without a default is always read; one with the default None is None unless the loss declares that it reads it under its
options, so a loss cannot read a column that its pipeline does not provide.

Axes: `T` tokens, `B` rows, `P` pairs. The loss is summed over `mask`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from actors.columns import COLUMNS, Head
from actors.imports import torch
from actors.objective import DIVERGENCE, EXTRAS, MicroBatch, Outputs, Stat

if TYPE_CHECKING:
    from torch import Tensor


def require(values: Tensor | None) -> Tensor:
    """A field that the loss declared to read under its options."""
    if values is None:
        raise TypeError("a loss reads a field that it does not declare with @reads under these options")
    return values


def joined(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Values of all views of this rank, concatenated. A rank whose micro-batches are all empty has none: of `dtype`,
    or float32."""
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=dtype or torch.float32)


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """Numbers per token, 0 where the mask is; others as they are."""
    if not values.is_floating_point() or len(values) != len(mask):
        return values
    return values.masked_fill(~mask.view(-1, *[1] * (values.dim() - 1)), 0.0)


@dataclass(frozen=True, kw_only=True)
class View:
    """One micro-batch with the output of the model's head."""

    head: ClassVar[Head]  # of the model
    main: ClassVar[str]  # the field that holds the head's output
    keep_groups: ClassVar[bool] = False  # rows of a group must share a micro-batch
    forward: ClassVar[frozenset[str]] = frozenset()  # options of the forward pass (`declare.FORWARD_OPTIONS`)

    micro: MicroBatch
    mask: Tensor  # [T] bool
    shared: Mapping[str, Tensor]  # statistics over all micro-batches and ranks, without gradient

    @classmethod
    def of(cls, micro: MicroBatch, outputs: Outputs, names: frozenset[str], shared: Mapping[str, Tensor]) -> Self:
        """The view of one micro-batch; of the optional fields, those in `names`. What the batch says of tokens that the
        loss is not summed over is 0 here, whatever it was (NaN, say, where nobody knows): multiplied by a mask, NaN
        would spoil the gradient."""
        optional, mask = names & {field.name for field in fields(cls)} - {"mask"}, cls.mask_of(micro)
        values: dict[str, Any] = {
            name: _where(mask, micro[name]) if name in COLUMNS else outputs.extra[name] for name in optional
        }
        values[cls.main] = outputs.main
        return cls(micro=micro, mask=mask, shared=shared, **values)

    @classmethod
    @cache
    def always_reads(cls) -> frozenset[str]:
        """Columns and extras whose fields have no default, and what the forward pass must do."""
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        return cls.forward | needed.intersection((*COLUMNS, *EXTRAS, DIVERGENCE))

    @staticmethod
    def mask_of(micro: MicroBatch) -> Tensor:
        """[T] bool: the tokens that the loss is summed over."""
        return micro["mask"]

    @staticmethod
    def count_items(micro: MicroBatch) -> int:
        """The number of items in a mean over items: rows, or pairs."""
        return len(micro)

    @property
    def head_output(self) -> Tensor:
        """The head's output."""
        return getattr(self, self.main)

    @cached_property
    def counts(self) -> Tensor:
        """[B]: masked tokens of each row."""
        return self.micro.sum_by_row(self.mask.to(self.head_output.dtype))

    def row_sums(self, values: Tensor) -> Tensor:
        """[T] -> [B]: sums over the masked tokens of each row."""
        return self.micro.sum_by_row(torch.where(self.mask, values, 0))

    def row_means(self, values: Tensor) -> Tensor:
        """[T] -> [B]: means over the masked tokens of each row; 0 for a row without any."""
        return self.row_sums(values) / self.counts.clamp(min=1)

    def token_stat(self, values: Tensor) -> Stat:
        """A metric that is the mean over masked tokens, of all micro-batches and ranks."""
        return Stat(torch.where(self.mask, values.detach(), 0).sum(), self.mask.sum())


@dataclass(frozen=True, kw_only=True)
class Tokens(View):
    """Every token with its log-probability under the trained weights."""

    head: ClassVar[Head] = Head.VOCABULARY
    main: ClassVar[str] = "logps"

    logps: Tensor  # [T], carries the gradient
    entropy: Tensor | None = None  # [T], nats
    is_top1: Tensor | None = None  # [T]
    mean_logps: Tensor | None = None  # [T], mean log-probability over the vocabulary


@dataclass(frozen=True, kw_only=True)
class Distilled(Tokens):
    """Every token with the divergence of its distribution from another one, computed by the function that the loss
    `compares`."""

    divergence: Tensor  # [T], carries the gradient

    sample_logps: Tensor | None = None  # [T], under the sampler


@dataclass(frozen=True, kw_only=True)
class Aligned(Distilled):
    """The tokens that begin where one of the teacher's own tokens begins: only of these it says something."""

    teacher_tail_logps: Tensor  # [T, 1]; NaN at tokens that are not aligned

    @staticmethod
    def mask_of(micro: MicroBatch) -> Tensor:
        return micro["mask"] & ~micro["teacher_tail_logps"].isnan().any(-1)


@dataclass(frozen=True, kw_only=True)
class Taught(Tokens):
    """The student's samples, with their log-probabilities under a teacher."""

    teacher_logps: Tensor  # [T]
    sample_logps: Tensor | None = None  # [T], under the sampler


@dataclass(frozen=True, kw_only=True)
class Scalars(View):
    """One number per token: the value of a state."""

    head: ClassVar[Head] = Head.TOKEN_SCALAR
    main: ClassVar[str] = "scalars"

    scalars: Tensor  # [T], carries the gradient


@dataclass(frozen=True, kw_only=True)
class LabelledSteps(Scalars):
    """One number per step, at the step's last token, which the model has read; the loss is summed over the steps that
    are labelled."""

    head: ClassVar[Head] = Head.STEP_SCALAR

    step_label: Tensor  # [T] int8: 1 right, 0 wrong, -1 where no labelled step ends

    @staticmethod
    def mask_of(micro: MicroBatch) -> Tensor:
        return micro["mask"] & (micro["step_label"] >= 0)

    @property
    def is_right(self) -> Tensor:
        """[T] bool."""
        return self.step_label > 0


@dataclass(frozen=True, kw_only=True)
class Scores(View):
    """One number per row, which the model outputs at its last token."""

    head: ClassVar[Head] = Head.ROW_SCALAR
    main: ClassVar[str] = "scores"

    scores: Tensor  # [B], carries the gradient


@dataclass(frozen=True, kw_only=True)
class PolicyTokens(Tokens):
    """Sampled tokens with their advantages."""

    advantages: Tensor  # [T]
    old_logps: Tensor | None = None  # [T], before this batch's updates
    sample_logps: Tensor | None = None  # [T], under the sampler
    ref_logps: Tensor | None = None  # [T]


@dataclass(frozen=True, kw_only=True)
class Paired(View):
    """Preference pairs: of the two rows of a group, one is preferred. Pairs are ordered by group."""

    keep_groups: ClassVar[bool] = True

    group: Tensor  # [B]
    preferred: Tensor  # [B] bool

    @staticmethod
    def count_items(micro: MicroBatch) -> int:
        return int(micro["preferred"].sum())

    @property
    def is_rejected(self) -> Tensor:
        """[B] bool."""
        return ~self.preferred

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """[P], [P]: the rows of the chosen and of the rejected completions."""
        order = self.group.argsort(stable=True)
        return order[self.preferred[order]], order[self.is_rejected[order]]

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> [P], [P]: values of the chosen and of the rejected completions."""
        chosen, rejected = self.sides
        return rows[chosen], rows[rejected]

    def pair_stat(self, values: Tensor) -> Stat:
        """A metric that is the mean over pairs, of all micro-batches and ranks."""
        return Stat(values.detach().sum(), len(values))


@dataclass(frozen=True, kw_only=True)
class Pairs(Paired, Tokens):
    """Preference pairs with the log-probabilities of their tokens."""

    log_sum_sq_probs: Tensor | None = None  # [T], log Σ_v π(v)²
    mean_logits: Tensor | None = None  # [T]


@dataclass(frozen=True, kw_only=True)
class ScoredPairs(Paired, Scores):
    """Preference pairs with the scores of their two sides."""

    margin: Tensor | None = None  # [B], the same for both rows of a pair


@dataclass(frozen=True, kw_only=True)
class RefPairs(Pairs):
    """Preference pairs with log-probabilities of a reference."""

    ref_logps: Tensor  # [T]


@dataclass(frozen=True, kw_only=True)
class SampledPairs(RefPairs):
    """Preference pairs that were sampled and scored."""

    reward: Tensor  # [B]
    truncated: Tensor  # [B] bool


@dataclass(frozen=True, kw_only=True)
class PairsOfTwoSamplers(SampledPairs):
    """Preference pairs of which one row was sampled from the policy and the other from the reference."""

    sampler: Tensor  # [B] int8, 0 for the policy

    @property
    def is_reference(self) -> Tensor:
        """[B] bool."""
        return self.sampler > 0


@dataclass(frozen=True, kw_only=True)
class Triples(Pairs):
    """Preference pairs, each with a gold completion as the third row of its group."""

    imitated: Tensor  # [B] bool

    @property
    def is_rejected(self) -> Tensor:
        return ~self.preferred & ~self.imitated


@dataclass(frozen=True, kw_only=True)
class ChosenTokens(Tokens):
    """The chosen completions, for a likelihood term in addition to a preference loss."""

    preferred: Tensor  # [B] bool

    @staticmethod
    def mask_of(micro: MicroBatch) -> Tensor:
        return micro["mask"] & micro.per_token(micro["preferred"])


@dataclass(frozen=True, kw_only=True)
class ChosenSequences(Tokens):
    """Prompts and completions of chosen rows: all tokens but the first of each row."""

    forward: ClassVar[frozenset[str]] = frozenset({"all_tokens"})

    preferred: Tensor  # [B] bool

    @staticmethod
    def mask_of(micro: MicroBatch) -> Tensor:
        follows = torch.ones_like(micro["mask"])
        follows[micro.offsets[:-1][micro.lengths > 0]] = False
        return follows & micro.per_token(micro["preferred"])


@dataclass(frozen=True, kw_only=True)
class GoldTokens(Tokens):
    """The gold completions of triples."""

    imitated: Tensor  # [B] bool

    @staticmethod
    def mask_of(micro: MicroBatch) -> Tensor:
        return micro["mask"] & micro.per_token(micro["imitated"])


@dataclass(frozen=True, kw_only=True)
class RefLabelled(Tokens):
    """Completions labelled desirable or not, with log-probabilities of a reference."""

    label: Tensor  # [B] bool
    ref_logps: Tensor  # [T]
    weight: Tensor | None = None  # [B]

    @cached_property
    def log_ratios(self) -> Tensor:
        """[B]: `log π(y) - log ref(y)`, summed over the row's tokens."""
        return self.row_sums(self.logps - self.ref_logps)

    def row_stat(self, values: Tensor, rows: Tensor) -> Stat:
        """A metric that is the mean over `rows` [B] bool, of all micro-batches and ranks."""
        return Stat(values.detach()[rows].sum(), rows.sum())
