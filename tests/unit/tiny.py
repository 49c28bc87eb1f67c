"""Tiny models and tokenizers that tests make for themselves, the same bits on every machine for a seed."""

from __future__ import annotations

import shutil
import string
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SPECIAL = ("<pad>", "<eos>")
CHARACTERS = string.digits + " +-*/=?.,:;!()" + string.ascii_lowercase + "\n" + string.ascii_uppercase
BYTE_LEVEL = {" ": "\u0120", "\n": "\u010a"}  # how byte-level vocabularies write them


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """One token per character; `<pad>` is 0, `<eos>` is 1; characters beyond the vocabulary are dropped.

    Byte-level without merges, because AutoTokenizer takes the class from the model's type, and Qwen2's rebuilds itself
    as byte-level whatever was saved.
    """
    tokens = [*SPECIAL, *(BYTE_LEVEL.get(character, character) for character in CHARACTERS)][:vocab]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token="<pad>",  # never produced: byte-level drops what it does not know
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    *, vocab: int = 64, hidden: int = 64, layers: int = 2, tied: bool = True, seed: int = 0
) -> Qwen2ForCausalLM:
    """A Qwen2 model with random weights, float32, two key-value heads for every four query heads."""
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def tiny_model_folder(
    tmp_path: Path, *, vocab: int = 64, hidden: int = 64, layers: int = 2, tied: bool = True, seed: int = 0
) -> Path:
    """A Hugging Face folder with a tiny model and its tokenizer, the test's own; the name says what is in it."""
    made = _made_folder(vocab, hidden, layers, tied, seed)
    return Path(shutil.copytree(made, tmp_path / made.name, dirs_exist_ok=True))


@cache
def _made_folder(vocab: int, hidden: int, layers: int, tied: bool, seed: int) -> Path:
    """Made once per process, as most tests want the same one."""
    folder = Path(_temporary().name) / f"tiny-v{vocab}-h{hidden}-l{layers}-{'tied' if tied else 'untied'}-s{seed}"
    tiny_model(vocab=vocab, hidden=hidden, layers=layers, tied=tied, seed=seed).save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-")  # removed when the process ends
