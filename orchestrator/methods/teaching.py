"""How a student learns from the distributions of teachers, for every method that distils."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.losses.distillation import TEACHER_TOP_K, distil, distil_top_k
from orchestrator.losses.reduce import token_mean
from orchestrator.methods.option_types import Positive
from orchestrator.pipeline import DataKind, Stage, infer_top_k, only_where, update

Roles = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Weights = tuple[Positive, ...] | None
TEACHER: tuple[str, ...] = ("teacher",)  # of one


@dataclass(frozen=True)
class Teachers:
    """The roles that teach: one; or several, of which each row of the data names its own in the column `teacher`; or
    several with `weights`, all of which teach every row. Raises ConfigError if that does not fit together."""

    roles: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(set(self.roles)) < len(self.roles):
            raise ConfigError(f"options.teachers={list(self.roles)} names a role twice; name each once")
        if self.weights is not None and (len(self.weights) != len(self.roles) or len(self.roles) == 1):
            raise ConfigError(
                f"options.teacher_weights={list(self.weights)}: there must be one for each of several teachers, and "
                f"options.teachers={list(self.roles)}"
            )

    @property
    def the_only_one(self) -> str:
        """The teacher whose model lives in the student's ranks. Raises ConfigError for several, which cannot."""
        if len(self.roles) > 1:
            raise ConfigError(
                f"options.teachers={list(self.roles)}: the ranks of the student hold the model of one teacher, and "
                "several have ranks of their own; set options.teacher_top_k (64, say), too"
            )
        return next(iter(self.roles))

    def taught(self, data: DataKind) -> DataKind:
        """The data, whose items name their teachers if these do not all teach every row."""
        return data.with_teachers(self.roles if len(self.roles) > 1 and self.weights is None else ())

    def say(self, ask: Callable[..., Stage], **options: Any) -> tuple[Stage, ...]:
        """What the teachers say of the rows: `ask(role, **options)`, of each its own rows, or side by side."""
        if len(self.roles) == 1:
            return (ask(self.roles[0], **options),)
        if self.weights is None:
            return tuple(only_where("teacher", at, ask(role, **options)) for at, role in enumerate(self.roles))
        return tuple(ask(role, beside=at > 0, **options) for at, role in enumerate(self.roles))

    @property
    def mixed(self) -> dict[str, Any]:
        """The option of a loss that mixes what they say."""
        return {} if self.weights is None else {"weights": tuple(each / sum(self.weights) for each in self.weights)}


def from_teachers(
    teachers: Teachers, *, beta: float, top_k: int | None, temperature: float | None, token_metrics: bool = False
) -> tuple[Stage, ...]:
    """Without `top_k` from a companion, a teacher in the student's ranks; with it from teachers in processes of their
    own, of any size, of whose distributions k tokens go over the wire. `temperature`: None for that of sampling."""
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "token_metrics": token_metrics}
    if top_k is None:
        return (update("policy", distil, reduce=token_mean, companion=teachers.the_only_one, **options),)
    return (
        *teachers.say(infer_top_k, into=TEACHER_TOP_K, k=top_k, temperature=temperature),
        update("policy", distil_top_k, reduce=token_mean, **options, **teachers.mixed),
    )
