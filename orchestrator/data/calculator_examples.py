"""The example `calculator`: multiplications, a conversation's tokenizer, and traces of somebody who uses a calculator
badly.

A model of the example's size cannot multiply in its head. The traces answer most problems that look easy from memory,
and wrongly, and a quarter of their calls mistype the problem: what supervised fine-tuning teaches is to call too
seldom. That it pays to call, and to type what was asked, is left to reinforcement learning.
"""

# pyright: basic
# (transformers has incomplete types)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A call of the calculator, with the expression between the two. Each is one token, so that a call has few.
CALL = ('<tool_call>{"name": "calculator", "arguments": {"expression": "', '"}}</tool_call>')
# A question and a tool's answer end with `=`, where the model's turn begins. The tools are not shown: there is one.
TEMPLATE = """
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}
    {{- m.content -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- call.function.arguments | tojson + '}</tool_call>' -}}
    {%- endfor -%}
    {{- eos_token -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- m.content + '=' -}}
  {%- endif -%}
{%- endfor -%}
"""

Messages = list[dict[str, Any]]
EASY_BELOW = 40  # a problem with a number below it looks easy


def problems(pairs: Sequence[tuple[int, int]]) -> dict[str, list[Any]]:
    """`prompt`, a conversation (37*58), and `answer` (2146)."""
    return {"prompt": [[_user(a, b)] for a, b in pairs], "answer": [str(a * b) for a, b in pairs]}


def traces(
    pairs: Sequence[tuple[int, int]], rng: np.random.Generator, from_memory: float, mistyped: float
) -> dict[str, list[Messages]]:
    """`messages`: conversations. Problems that look easy are answered from memory with that probability, off by up to
    a fifth; of the calls, that share has one digit of the problem wrong."""
    found: list[Messages] = []
    for a, b in pairs:
        typed = (a, b)
        if rng.random() < mistyped:
            typed = _mistyped(a, b, rng)
        if min(a, b) < EASY_BELOW and rng.random() < from_memory:
            off = max(1, round(a * b * rng.uniform(0.02, 0.2))) * rng.choice([-1, 1])
            found.append([_user(a, b), {"role": "assistant", "content": str(a * b + off)}])
        else:
            found.append([_user(a, b), *_called(*typed)])
    return {"messages": found}


def tokenizer(plain: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The given one, with the tokens of a call and a chat template."""
    plain.add_tokens(list(CALL))
    plain.chat_template = TEMPLATE
    return plain


def _user(a: int, b: int) -> dict[str, Any]:
    return {"role": "user", "content": f"{a}*{b}"}


def _called(a: int, b: int) -> Messages:
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": f"{a}*{b}"}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": str(a * b)},
        {"role": "assistant", "content": str(a * b)},
    ]


def _mistyped(a: int, b: int, rng: np.random.Generator) -> tuple[int, int]:
    """One of the two numbers has another last digit."""
    other = lambda n: n // 10 * 10 + (n % 10 + int(rng.integers(1, 10))) % 10  # noqa: E731
    return (other(a), b) if rng.random() < 0.5 else (a, other(b))
