"""What a judge is asked about the completions of a prompt, and what its answers make of them. Pure.

    completions ─► `plan`: comparisons or ratings ─► `questions`, texts ─► a model's answers ─► `judged` ─► [n] values

The kinds:

    pairwise   each pair of completions of a prompt, in both orders; a judge that contradicts itself when the order
               changes has called a tie. Value: the share of its siblings (or of reference texts) that a completion
               beats, a tie counting half: its win rate
    rubric     a number within a range; value: the mean over several judgements
    binary     yes or no; value: 1 or 0, the mean over several judgements

An answer that cannot be read is no opinion, never a number: it takes part in no mean. A completion about which no
answer could be read has the value None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from actors.errors import ConfigError

Kind = Literal["pairwise", "rubric", "binary"]
Answers = Mapping[str, Sequence[str]]  # question -> the answers to it, one per judgement

GROUPS: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # of a pattern: those that it must have, and may have
    "pairwise": (frozenset({"first", "second"}), frozenset({"tie"})),
    "rubric": (frozenset({"score"}), frozenset()),
    "binary": (frozenset({"yes", "no"}), frozenset()),
}
PATTERNS: dict[str, str] = {  # that fit the prompts which come with Troupe
    "pairwise": r"(?i)verdict\W{1,6}(?:answer\s+)?(?:(?P<first>A)|(?P<second>B)|(?P<tie>tie))\b",
    "rubric": r"(?i)score\W{1,6}?(?P<score>-?\d+(?:\.\d+)?)",
    "binary": r"(?i)verdict\W{1,6}(?:(?P<yes>yes)|(?P<no>no)|undecided)\b",
}
FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # of a prompt: those that it must have, and may have
    "pairwise": (frozenset({"response0", "response1"}), frozenset({"prompt"})),
    "rubric": (frozenset({"completion"}), frozenset({"prompt", "lowest", "highest"})),
    "binary": (frozenset({"completion"}), frozenset({"prompt"})),
}


@dataclass(frozen=True)
class Asking:
    """How a judge is asked and its answers are read. `template`: a prompt with the fields of its kind and columns of
    the data in braces, as of `str.format`. `pattern`: a regular expression whose named groups say what an answer
    means; its last match in the answer counts. `against`: the column with a text that each completion is compared
    with, in place of its siblings."""

    kind: Kind
    template: str
    pattern: str
    lowest: float = 0.0
    highest: float = 10.0
    judgements: int = 1
    against: str | None = None

    def check(self, where: str) -> None:
        """Raises ConfigError for a prompt or a pattern that cannot be used; `where` names the judge."""
        fields = self._fields(where)
        needed, allowed = FIELDS[self.kind]
        if missing := sorted(needed - fields):
            raise ConfigError(
                f"{where}: the prompt of a {self.kind} judge must have the field {{{missing[0]}}}; it has "
                f"{', '.join(sorted(fields)) or 'none'}"
            )
        misplaced = sorted(fields & (frozenset().union(*(a | b for a, b in FIELDS.values())) - needed - allowed))
        if misplaced:
            raise ConfigError(
                f"{where}: the prompt of a {self.kind} judge has no field {{{misplaced[0]}}}, which is another kind's"
            )
        self._check_pattern(where)

    @property
    def columns(self) -> frozenset[str]:
        """Columns of the data set that the questions need."""
        needed, allowed = FIELDS[self.kind]
        mentioned = {name for _, name, _, _ in Formatter().parse(self.template) if name}
        return frozenset(mentioned - needed - allowed) | ({self.against} if self.against else set())

    def plan(self, cases: Cases) -> Plan:
        if self.kind == "pairwise":
            return Plan(self, len(cases), comparisons=tuple(self._comparisons(cases)))
        texts = (self._rendered(cases, row, completion=text) for row, text in enumerate(cases.completions))
        return Plan(self, len(cases), ratings=tuple(texts))

    def requests(self, completions: int) -> int:
        """The most questions that so many completions of a prompt make, each judgement counted."""
        each = 1 if self.kind != "pairwise" else 2 if self.against else completions - 1
        return completions * each * self.judgements

    def read(self, answer: str) -> float | None:
        """What an answer says, from the side of what was shown (first): 1, 0, or 0.5 for a tie; of a rubric the
        score. None if it cannot be read, or is outside the range."""
        found = list(re.finditer(self.pattern, answer))
        if not found:
            return None
        said = {name: text for name, text in found[-1].groupdict().items() if text is not None}
        if self.kind == "rubric":
            return self._within(said.get("score"))
        meanings = {"first": 1.0, "yes": 1.0, "tie": 0.5, "second": 0.0, "no": 0.0}
        return next((meanings[name] for name in said if name in meanings), None)

    def _within(self, text: str | None) -> float | None:
        try:
            score = float(text or "")
        except ValueError:
            return None
        return score if self.lowest <= score <= self.highest else None

    def _comparisons(self, cases: Cases) -> Iterator[Comparison]:
        for row, text in enumerate(cases.completions):
            if self.against is not None:
                yield self._comparison(cases, row, None, text, as_text(cases.columns[self.against][row]))
                continue
            for other in range(row + 1, len(cases)):
                if cases.prompts[other] == cases.prompts[row]:
                    yield self._comparison(cases, row, other, text, cases.completions[other])

    def _comparison(self, cases: Cases, row: int, other: int | None, mine: str, theirs: str) -> Comparison:
        if mine == theirs:
            return Comparison(row, other, ())  # nobody need be asked
        orders = ((mine, theirs), (theirs, mine))
        return Comparison(row, other, tuple(self._rendered(cases, row, response0=a, response1=b) for a, b in orders))

    def _rendered(self, cases: Cases, row: int, **texts: str) -> str:
        columns = {name: as_text(values[row]) for name, values in cases.columns.items()}
        own = {"prompt": cases.prompts[row], "lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}
        return self.template.format(**{**columns, **own, **texts})

    def _fields(self, where: str) -> frozenset[str]:
        try:
            parts = [part for part in Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise ConfigError(f"{where}: the prompt cannot be read: {error}; write {{{{ and }}}} for braces") from None
        for _, name, spec, conversion in parts:
            if not str(name).isidentifier() or spec or conversion:  # attributes of values are none of its business
                raise ConfigError(
                    f"{where}: the prompt has the field {{{name}}}; a field is a name and nothing else, and braces "
                    "that are no field are written {{ and }}"
                )
        return frozenset(str(part[1]) for part in parts)

    def _check_pattern(self, where: str) -> None:
        try:
            groups = frozenset(re.compile(self.pattern).groupindex)
        except re.error as error:
            raise ConfigError(f"{where}: pattern={self.pattern!r} is no regular expression: {error}") from None
        needed, allowed = GROUPS[self.kind]
        if groups - needed - allowed or needed - groups:
            wanted = " and ".join(f"(?P<{name}>...)" for name in sorted(needed))
            also = "".join(f", and may have (?P<{name}>...)" for name in sorted(allowed))
            raise ConfigError(
                f"{where}: pattern={self.pattern!r} must have the named groups {wanted}{also}; it has "
                f"{', '.join(sorted(groups)) or 'none'}"
            )


@dataclass(frozen=True)
class Cases:
    """What is judged: of each of n completions its prompt, its text and the data set's columns."""

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True)
class Comparison:
    """Completion `row` with its sibling `other` (None: a text that is no completion). `questions`: the two texts, `row`
    first in the one and second in the other; none for equal texts, which tie."""

    row: int
    other: int | None
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """`values` [n], None for no opinion. Of the answers: how many there were and could not be read. Of the comparisons
    that were asked: how many there were, and in how many the verdict depended on the order."""

    values: tuple[float | None, ...]
    answers: int = 0
    unparsable: int = 0
    comparisons: int = 0
    contradictory: int = 0
    said: tuple[tuple[str, ...], ...] = ()  # [n]: answers to the questions in which the completion is the (first) one


@dataclass(frozen=True)
class Plan:
    """The questions about n completions, and the way back from their answers."""

    asking: Asking
    count: int
    comparisons: tuple[Comparison, ...] = ()
    ratings: tuple[str, ...] = ()  # [n]

    @property
    def questions(self) -> tuple[str, ...]:
        """Each once, however many completions are equal."""
        compared = (text for comparison in self.comparisons for text in comparison.questions)
        return tuple(dict.fromkeys((*compared, *self.ratings)))

    def judged(self, answers: Answers) -> Judged:
        """Values from the answers to all questions."""
        read = {text: [self.asking.read(answer) for answer in given] for text, given in answers.items()}
        every = [value for values in read.values() for value in values]
        counts = {"answers": len(every), "unparsable": every.count(None)}
        if self.asking.kind != "pairwise":
            values = tuple(_mean(read[text]) for text in self.ratings)
            return Judged(values, **counts, said=tuple(tuple(answers[text]) for text in self.ratings))
        return self._win_rates(read, answers, counts)

    def _win_rates(
        self, read: Mapping[str, Sequence[float | None]], answers: Answers, counts: Mapping[str, int]
    ) -> Judged:
        won: list[list[float]] = [[] for _ in range(self.count)]
        said: list[tuple[str, ...]] = [()] * self.count
        contradictory = 0
        for comparison in self.comparisons:
            outcome, contradicts = _outcome([read[text] for text in comparison.questions])
            contradictory += contradicts
            if outcome is not None:
                won[comparison.row].append(outcome)
                if comparison.other is not None:
                    won[comparison.other].append(1 - outcome)
            for row, text in zip((comparison.row, comparison.other), comparison.questions):
                if row is not None:
                    said[row] = (*said[row], *answers[text])
        asked = sum(bool(comparison.questions) for comparison in self.comparisons)
        values = tuple(map(_mean, won))
        return Judged(values, **counts, comparisons=asked, contradictory=contradictory, said=tuple(said))


def _outcome(orders: Sequence[Sequence[float | None]]) -> tuple[float | None, bool]:
    """What the first of two texts gets out of a comparison: 1, 0, or 0.5 for a tie, the mean over judgements; None if
    no judgement could be read in both orders. Beside it, whether the verdict changed with the order."""
    if not orders:
        return 0.5, False
    forward, backward = orders
    outcomes: list[float] = []
    contradicts = False
    for mine, theirs in zip(forward, backward, strict=True):
        if mine is None or theirs is None:
            continue
        agree = mine == 1 - theirs
        contradicts |= not agree
        outcomes.append(mine if agree else 0.5)
    return _mean(outcomes), contradicts


def all_true(each: Sequence[Judged]) -> Judged:
    """A mixture of binary judges: 1 if all say yes, 0 if one does not, None if one has no opinion.

    Source: arXiv:2409.20370 (CGPO, mixture of judges)."""
    rows = zip(*(judged.values for judged in each), strict=True)
    values = tuple(None if None in row else float(all(value == 1 for value in row)) for row in rows)
    said = tuple(
        tuple(text for texts in row for text in texts) for row in zip(*(one.said for one in each), strict=True)
    )
    counts = {name: sum(getattr(one, name) for one in each) for name in ("answers", "unparsable")}
    return Judged(values, **counts, said=said)


def as_text(value: Any) -> str:
    """A prompt, a completion or a column's value as a judge reads it: a conversation of one message is its content, a
    longer one has a line for each message's role."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        messages: list[Mapping[str, Any]] = value
        if len(messages) == 1:
            return str(messages[0].get("content", ""))
        return "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)
    return str(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
