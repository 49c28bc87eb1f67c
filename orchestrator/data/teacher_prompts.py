"""A second prompt of each item, for a teacher that knows more: a demonstration, feedback, a hint.

It is a template, in Python's notation for formatting, of columns of the data: `{prompt}` is the text of the prompt, or
of its last message; `{demonstration}` stands for a completion that is there only when it was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from actors.errors import ConfigError
from orchestrator.data import cells
from orchestrator.data.cells import Row
from orchestrator.data.conversation import Content, RowError

PROMPT, SAMPLED = "prompt", "demonstration"
MARK = "\ufdd0"  # a noncharacter, where the demonstration goes


def fields_of(template: str) -> tuple[str, ...]:
    """Columns of the data that a template reads, besides the prompt. Raises ConfigError for what is no template."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"options.teacher_template={template!r}: {error}; a brace is written twice") from None
    if wrong := [name for name in names if not name.isidentifier()]:
        raise ConfigError(f"options.teacher_template={template!r}: {{{wrong[0]}}} is not the name of a column")
    if names.count(SAMPLED) > 1:
        raise ConfigError(f"options.teacher_template={template!r} has {{{SAMPLED}}} more than once")
    return tuple(dict.fromkeys(name for name in names if name not in (PROMPT, SAMPLED)))


def teacher_prompt(prompt: Content, row: Row, template: str) -> Content:
    """The prompt that the teacher of a row reads, with `MARK` for the demonstration. Raises RowError."""
    names = fields_of(template)
    if missing := [name for name in names if name not in row]:
        raise RowError(f"{missing[0]} is missing, and options.teacher_template needs it")
    values = {name: cells.text(row, name) for name in names} | {SAMPLED: MARK}
    if isinstance(prompt, str):
        return template.format(prompt=prompt, **values)
    *before, last = prompt
    asked = last.get("content")
    if not isinstance(asked, str):
        raise RowError("the last message of prompt has no text, and options.teacher_template is about that")
    return [*before, {**last, "content": template.format(prompt=asked, **values)}]


def spliced(parts: Sequence[Sequence[int]], insert: int) -> list[int]:
    """Tokens of the texts around the mark, with `insert` in its place."""
    first, *others = parts
    return [*first, *(token for part in others for token in (insert, *part))]
