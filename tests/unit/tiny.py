"""Tiny models and tokenizers that tests make for themselves, the same bits on every machine for a seed."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = string.digits + " +-*/=?.,:;!()" + string.ascii_lowercase + "\n" + string.ascii_uppercase


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """One token per character; `<pad>` is 0, `<eos>` is 1; characters beyond the vocabulary become `<unk>`."""
    tokens = [*SPECIAL, *CHARACTERS][:vocab]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(*, vocab: int = 64, hidden: int = 64, layers: int = 2, tied: bool = True, seed: int = 0) -> Qwen2ForCausalLM:
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
    """A Hugging Face folder with a tiny model and its tokenizer; the name says what is in it."""
    folder = tmp_path / f"tiny-v{vocab}-h{hidden}-l{layers}-{'tied' if tied else 'untied'}-s{seed}"
    tiny_model(vocab=vocab, hidden=hidden, layers=layers, tied=tied, seed=seed).save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder
