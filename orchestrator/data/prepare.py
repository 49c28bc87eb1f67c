"""From raw rows to rows of tokens: read in their format, tokenised, truncated; with a record of each row's outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data import cells
from orchestrator.data.cells import Row
from orchestrator.data.conversation import RowError, refuse_other_ending
from orchestrator.data.formats import Example, Format
from orchestrator.data.teacher_prompts import fields_of, teacher_prompt
from orchestrator.data.template import EndlessTemplate
from orchestrator.data.tokenise import Encoded, Tokeniser
from orchestrator.data.truncation import Fit, Limits, Truncation
from orchestrator.pipeline import DataKind

OPTIONAL = ("tools", "chat_template_kwargs", "labels", "completion_mask", "assistant_masks")
Refuse = Callable[[int, str], None]  # (row, reason)
Origin = Callable[[int], tuple[str, int]]  # row -> (source, number in it)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One item: its raw row, the example read from that, and its tokens."""

    row: int
    example: Example
    fit: Fit
    teacher_prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preparer:
    """How raw rows of one data set become items. `tokeniser=None`: rows are only read and checked."""

    format: Format
    limits: Limits
    tokeniser: Tokeniser | None
    prompts_only: bool
    assistant_only: bool
    teachers: tuple[str, ...] = ()  # one of which each row names
    teacher_template: str | None = None
    teacher_tokeniser: Tokeniser | None = None  # of teachers' prompts; None: the same

    def read(self, rows: Iterable[tuple[int, Row]], refuse: Refuse) -> list[tuple[int, Example]]:
        """(row, example); some formats make several examples of one row."""
        read: list[tuple[int, Example]] = []
        for number, row in rows:
            try:
                teacher = cells.one_of(row, "teacher", self.teachers) if self.teachers else None
                examples = (replace(example, teacher=teacher) for example in self.format.read(row))
                if self.teacher_template is not None:
                    examples = map(partial(_with_teacher_prompt, row=row, template=self.teacher_template), examples)
                read += [(number, self._ending_well(example)) for example in examples]
            except RowError as error:
                refuse(number, str(error))
        return read

    def _ending_well(self, example: Example) -> Example:
        for completion in () if self.assistant_only else example.completions:
            refuse_other_ending(completion)
        return example

    def prepare(self, rows: Iterable[tuple[int, Row]], refuse: Refuse, origin: Origin) -> list[Prepared]:
        """Items in the order of their rows. Rows that cannot be used go to `refuse`. Raises DataError for a row whose
        chat template does not end: it is not tried on further rows."""
        read = self.read(rows, refuse)
        if self.tokeniser is None:
            return []
        prepared: list[Prepared] = []
        fit = self.limits.fit_prompt if self.prompts_only else self.limits.fit_rows
        for (number, example), encoded in zip(read, self.tokeniser.encode([e for _, e in read]), strict=False):
            if isinstance(encoded, EndlessTemplate):
                source, line = origin(number)
                raise DataError(f"{source}, row {line}: {encoded}")
            try:
                teachers = self.teacher_tokeniser or self.tokeniser
                seen = teachers.teacher_prompt(example) if example.teacher_prompt is not None else ()
                prepared.append(Prepared(number, example, fit(_given(encoded)), seen))
            except RowError as error:
                refuse(number, str(error))
        return prepared


def _with_teacher_prompt(example: Example, row: Row, template: str) -> Example:
    if example.prompt is None:
        raise RowError("options.teacher_template needs the column prompt")
    return replace(example, teacher_prompt=teacher_prompt(example.prompt, row, template))


def _given(encoded: Encoded | RowError) -> Encoded:
    if isinstance(encoded, RowError):
        raise encoded
    return encoded


def limits_of(data: DataConfig, kind: DataKind, model_max_length: int) -> Limits:
    """The limits that apply. A limit that the model cannot hold is a DataError. Packing that splits rows has none."""
    for name in ("max_length", "max_prompt_length"):
        given = getattr(data, name)
        if given is not None and given > model_max_length:
            raise DataError(f"data.{name}={given}, but the model holds {model_max_length} tokens")
    if data.packing != "none" and kind.name != "completions":
        raise DataError(f"data.packing={data.packing} is for completions, not for {kind.name}: leave it out")
    truncation = truncation_of(data, kind)
    if kind.prompts_only:
        longest = data.max_prompt_length or data.max_length or model_max_length - 1
        return Limits(None, longest, truncation)
    splits = data.packing in ("bfd_split", "wrapped")
    if splits and truncation != "keep_start" and data.max_prompt_length is None:
        raise DataError(
            f"data.truncation={truncation} is for what is cut, and data.packing={data.packing} cuts nothing off: "
            "leave one of them out, or set data.packing=bfd"
        )
    longest = None if splits else data.max_length or model_max_length
    return Limits(longest, data.max_prompt_length, truncation)


def truncation_of(data: DataConfig, kind: DataKind) -> Truncation:
    """How rows that are too long are handled. Raises DataError if they would be truncated and must not be."""
    if data.truncation is None:
        return "drop" if kind.uncut else "keep_start"
    if kind.uncut and data.truncation in ("keep_start", "keep_end"):
        raise DataError(
            f"data.truncation={data.truncation} would cut rows that are judged as a whole: a part of an answer is "
            "another answer. Leave it out, and pairs with a side that is too long are left out; or set it to error"
        )
    if "step_label" in kind.columns and data.truncation == "keep_end":
        raise DataError(
            "data.truncation=keep_end would cut off the problem that the steps are about, so that their labels would "
            "be those of another one. Set keep_start (steps at the end lose their labels), drop or error"
        )
    return data.truncation


def wanted_columns(form: Format, kind: DataKind, data: DataConfig, found: Sequence[str]) -> list[str]:
    """Columns that are read. A column called `weight` or `margin` is read only if data.columns names it."""
    names = [*form.columns, *OPTIONAL]
    names += ["prompt"] * ("label" in kind.columns) + ["weight"] * ("weight" in data.columns)
    names += ["teacher"] * bool(kind.teachers)
    names += fields_of(kind.teacher_template) if kind.teacher_template is not None else ()
    names += ["margin"] * ("margin" in data.columns and "preferred" in kind.columns)
    return [name for name in dict.fromkeys(names) if name in found]
