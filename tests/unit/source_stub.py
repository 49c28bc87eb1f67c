"""Tokenizers and opening of sources for the tests of data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from orchestrator.config.schema import DataConfig
from orchestrator.data import synthetic_examples as examples
from orchestrator.data.source import Source, open_source
from orchestrator.pipeline import DataKind

PLAIN_TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if shout is defined and shout %}!{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }};"
    "{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """One token per byte."""
    words = examples.tokenizer()
    words.chat_template = chat_template
    return words


def merging_tokenizer(*pairs: str) -> PreTrainedTokenizerBase:
    """One token per byte, but each of the two-letter `pairs` is one token."""
    tokens = ["<pad>", "<eos>", *sorted(ByteLevel.alphabet()), *pairs]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(pair[0], pair[1]) for pair in pairs],  # pyright: ignore[reportArgumentType]
        unk_token=None,  # pyright: ignore[reportArgumentType]
        pad_token="<pad>",
        eos_token="<eos>",
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def opened(
    path: Path | str,
    kind: DataKind,
    words: PreTrainedTokenizerBase | None = None,
    *,
    model_max_length: int = 512,
    **data: Any,
) -> Source:
    """A source with seed 0, in the data's own order unless told otherwise."""
    keys: dict[str, Any] = {"path": str(path), "shuffle": False, **data}
    config = DataConfig(**keys)
    return open_source(config, kind, words or tokenizer(), seed=0, model_max_length=model_max_length)


def previews(tmp_path: Path, row: dict[str, Any], kind: DataKind, template: str | None = None, **data: Any) -> str:
    """How the first item of a file with this row is shown: what is learned from is in brackets."""
    return opened(write_rows(tmp_path / "d.jsonl", [row]), kind, tokenizer(template), **data).preview()
