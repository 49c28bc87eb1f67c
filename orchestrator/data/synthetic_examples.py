"""The example models and data sets that Troupe generates: `example:NAME` in `model.path` and `data.path`.

Everything is generated from a seed, so that the same name and seed are the same bits everywhere, without a download.

arithmetic   a model of 1.4M parameters with random weights; two-digit additions with answers, and data sets of them for
             every kind of method, as `arithmetic_examples` describes them
calculator   the same model with a chat template, two-digit multiplications as conversations, and, as `calculator_sft`,
             conversations with calls of a calculator that is used badly
skewed       models with random weights that end their completions at a constant rate, and random text whose lengths
             are as skewed as those of real data: a workload for measuring speed
"""

# pyright: basic
# (torch, transformers and datasets have incomplete types)

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.errors import DataError, ModelError
from orchestrator.data import arithmetic_examples, calculator_examples
from orchestrator.data.arithmetic_examples import SPLITS, number_pairs, shuffled

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

PREFIX = "example:"
PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1


def is_example(path: str) -> bool:
    """True for `example:NAME`."""
    return path.startswith(PREFIX)


def calculator(*, seed: int, split: str, rows: int | None = None) -> dict[str, list[Any]]:
    """Two-digit multiplications: `prompt`, a conversation, and `answer`; split as `arithmetic` is."""
    return calculator_examples.problems(shuffled(number_pairs(split), seed, rows))


def calculator_sft(
    *, seed: int, split: str, rows: int | None = None, from_memory: float = 0.75, mistyped: float = 0.25
) -> dict[str, list[Any]]:
    """Conversations with a calculator, as `calculator_examples.traces` describes them; right ones in `test`."""
    pairs, rng = shuffled(number_pairs(split), seed, rows), np.random.default_rng([seed, 5])
    shares = (from_memory, mistyped) if split == "train" else (0.0, 0.0)
    return calculator_examples.traces(pairs, rng, *shares)


def skewed(*, seed: int, split: str, rows: int = 512, max_length: int = 256) -> dict[str, list[str]]:
    """Random letters: `prompt`, `completion`, together `max_length` x Beta(0.9, 2.1) tokens with the end-of-sequence
    token; a quarter of that is the prompt."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    totals = np.clip(np.rint(max_length * rng.beta(0.9, 2.1, rows)), 4, max_length).astype(int)
    texts = ["".join(map(chr, rng.integers(ord("a"), ord("z") + 1, total - 1))) for total in totals]
    cuts = [max(1, len(text) // 4) for text in texts]
    return {
        "prompt": [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        "completion": [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    }


DATASETS: dict[str, Callable[..., dict[str, Any]]] = {
    **arithmetic_examples.DATASETS,
    "calculator": calculator,
    "calculator_sft": calculator_sft,
    "skewed": skewed,
}


def dataset(name: str, *, seed: int, split: str, **options: Any) -> Dataset:
    """The data set `example:NAME`. Raises DataError for an unknown name, split or option."""
    if name not in DATASETS:
        raise DataError(f"there is no example data set {name!r}; there are {', '.join(sorted(DATASETS))} (data.path)")
    if split not in SPLITS:
        raise DataError(f"example:{name} has no split {split!r}; it has {' and '.join(SPLITS)} (data.split)")
    allowed = sorted(set(inspect.signature(DATASETS[name]).parameters) - {"seed", "split"})
    if unknown := sorted(set(options) - set(allowed)):
        raise DataError(f"example:{name} has no option {unknown[0]!r}; it has {', '.join(allowed)} (data.options)")
    from datasets import Dataset

    return Dataset.from_dict(DATASETS[name](seed=seed, split=split, **options))


@dataclass(frozen=True)
class ModelRecipe:
    """A Qwen2-architecture model with random weights. `ends_after`: if set, completions end at a constant rate per
    token, such that their mean length is 30 % of this limit. `talks`: the tokenizer has a chat template."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    tied: bool
    init_std: float
    max_position: int = 1024
    ends_after: int | None = None
    talks: bool = False


MODELS: dict[str, ModelRecipe] = {
    "arithmetic": ModelRecipe(256, 2, 8, 8, 512, tied=True, init_std=0.05),
    "calculator": ModelRecipe(256, 2, 8, 8, 512, tied=True, init_std=0.05, talks=True),
    "skewed-2.6m": ModelRecipe(256, 4, 8, 4, 544, tied=False, init_std=0.02, ends_after=96),
    "skewed-26m": ModelRecipe(512, 8, 8, 8, 1408, tied=False, init_std=0.02, ends_after=96),
}


def model_folder(name: str, seed: int, cache_dir: Path | None = None) -> Path:
    """The Hugging Face folder of `example:NAME`, generated if it does not exist; safe to call from two processes at
    once."""
    if name not in MODELS:
        raise ModelError(f"there is no example model {name!r}; there are {', '.join(sorted(MODELS))} (model.path)")
    recipe = MODELS[name]
    folder = (cache_dir or default_cache_dir()) / f"{name}-{seed}-{_fingerprint(recipe)}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(folder, lambda target: _save(recipe, seed, target))
    return folder


def default_cache_dir() -> Path:
    """`$TROUPE_CACHE`, else `~/.cache/troupe`; with `examples` below it."""
    root = os.environ.get("TROUPE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "troupe") / "examples"


def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte of UTF-8, so that any text can be encoded; `<pad>` is 0, `<eos>` is 1.

    Qwen2's class, because AutoTokenizer picks the class by the model's type and would rebuild another one as this."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens = [PAD, EOS, *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token=None,  # pyright: ignore[reportArgumentType]
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _fingerprint(recipe: ModelRecipe) -> str:
    return blake2b(json.dumps(asdict(recipe), sort_keys=True).encode(), digest_size=4).hexdigest()


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """The folder appears complete or not at all. If two processes write it, either result is kept: they are equal."""
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(staging)
        staging.chmod(0o755)
        os.replace(staging, folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save(recipe: ModelRecipe, seed: int, folder: Path) -> None:
    """The files of `save_pretrained`, without its imports and its output, which would slow down a user's first run."""
    from safetensors.torch import save_file

    words = calculator_examples.tokenizer(tokenizer()) if recipe.talks else tokenizer()
    model = _build(recipe, seed, len(words))
    weights = model.state_dict()
    if recipe.tied:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
    for part in (model.config, model.generation_config, words):
        part.save_pretrained(folder)


def _build(recipe: ModelRecipe, seed: int, vocab_size: int) -> Qwen2ForCausalLM:
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(_config(recipe, vocab_size)).eval()
        if recipe.ends_after is not None:
            _end_at_constant_rate(model, rate_for(recipe.ends_after))
    return model


def _config(recipe: ModelRecipe, vocab_size: int) -> Qwen2Config:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.max_position,
        tie_word_embeddings=recipe.tied,
        initializer_range=recipe.init_std,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )


@cache
def rate_for(limit: int, mean: float = 0.3) -> float:
    """The probability of ending at each token with which completions of at most `limit` have mean `mean` x `limit`."""
    low, high = 1e-9, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        longer = (1 - (1 - rate) ** limit) / rate > mean * limit
        low, high = (rate, high) if longer else (low, rate)
    return high


def _end_at_constant_rate(model: Any, rate: float) -> None:
    """Give the hidden state one dimension that is the same at every token, and read the end-of-sequence logit from it
    alone: then the probability of ending hardly depends on the text. Padding is never sampled."""
    import torch

    head = model.lm_head.weight
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head[:, 0] = 0.0
        head[[PAD_ID, EOS_ID]] = 0.0
        probe = torch.randint(EOS_ID + 1, model.config.vocab_size, (8, 64))
        hidden = model.model(probe).last_hidden_state
        others = (hidden @ head.T)[..., EOS_ID + 1 :].logsumexp(-1).mean()
        constant = hidden[..., 0].mean()
        head[EOS_ID, 0] = (others + np.log(rate / (1 - rate))) / constant
        head[PAD_ID, 0] = -30.0 / constant
