"""A tokenizer with a chat template that writes tools, calls and answers, for tests of episodes."""

from __future__ import annotations

from typing import Any

from orchestrator.data.synthetic_examples import tokenizer

TEMPLATE = """{% if tools %}[tools]{{ tools | tojson }}
{% endif %}
{% for m in messages %}
[{{ m.role }}]{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<eos>
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
FORGETFUL = TEMPLATE.replace("]{{ m.content }}", "]{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
EOS = 1


def byte_tokenizer(template: str = TEMPLATE) -> Any:
    """One token per byte; `<eos>` is the only thing that ends a turn."""
    made: Any = tokenizer()
    made.chat_template = template
    return made


def ids(text: str) -> list[int]:
    """Of the model's own words: `<eos>` in it is the token."""
    return byte_tokenizer()(text, add_special_tokens=False).input_ids
