"""The example models and data sets that Troupe generates: `example:NAME` in `model.path` and `data.path`.

Everything is generated from a seed, so that the same name and seed are the same bits everywhere, without a download.

arithmetic   a model of 1.3M parameters with random weights; two-digit additions with answers; as `arithmetic_sft`,
             worked additions that omit most carries of the ones, so that supervised fine-tuning alone stops improving;
             and, as `arithmetic_pairs`, `_triples` and `_labelled`, right answers paired with wrongly carried ones,
             with which preference optimisation continues; as `arithmetic_worked`, additions worked in three steps, and
             as `arithmetic_steps`, such steps with labels, of which one is wrong in half of the answers; as
             `arithmetic_judgements`, sums that are worked out, with y or n: is it right? As `arithmetic_revisions`,
             conversations in which the answer is wrong as often, then worked out in steps, then revised (for the model
             `calculator`)
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
from orchestrator.data import calculator_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

PREFIX = "example:"
SPLITS = ("train", "test")
PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1
_SPLIT_SEED = 20_240_229  # of the held-out problems: the same for every run, so that no phase trains on another's test


def is_example(path: str) -> bool:
    """True for `example:NAME`."""
    return path.startswith(PREFIX)


def arithmetic(*, seed: int, split: str, rows: int | None = None, conversation: bool = False) -> dict[str, list[Any]]:
    """Two-digit additions: `prompt` (37+58=) and `answer` (95). No problem of `test`, nor its mirror, is in `train`.
    `conversation`: the prompt is a message of the user's (37+58)."""
    problems = _shuffled(_problems(split), seed, rows)
    prompts = [_asked(f"{a}+{b}") if conversation else f"{a}+{b}=" for a, b in problems]
    return {"prompt": prompts, "answer": [str(a + b) for a, b in problems]}


def arithmetic_sft(
    *, seed: int, split: str, rows: int | None = None, forgotten: float = 0.7, hinted: float = 0.0
) -> dict[str, list[str]]:
    """Worked additions: `prompt`, `completion`. In `train`, a carry of the ones is omitted with probability
    `forgotten`: the likeliest answer is then wrong on every problem with a carry, which are 45 % of all. `hinted`: of
    this share of `train`, the prompt begins with the right answer ((95)37+58=), and the completion is that."""
    rng, hints = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    problems = _shuffled(_problems(split), seed, rows)
    told = hints.random(len(problems)) < (hinted if split == "train" else 0.0)
    forgets = (rng.random(len(problems)) < (forgotten if split == "train" else 0.0)) & ~told
    answers = [_without_carry(a, b) if forget else str(a + b) for (a, b), forget in zip(problems, forgets, strict=True)]
    prompts = [f"({a + b}){a}+{b}=" if hint else f"{a}+{b}=" for (a, b), hint in zip(problems, told, strict=True)]
    return {"prompt": prompts, "completion": answers}


def arithmetic_pairs(*, seed: int, split: str, rows: int | None = None, slips: float = 0.0) -> dict[str, list[str]]:
    """Additions: `prompt`, `chosen` (the sum), `rejected` (the sum without its carry, or where there is none, with one:
    otherwise always carrying would be preferred). With probability `slips` the rejected answer is wrong in any other
    way, by 1 to 20: a reward model that has seen one kind of mistake only likes all others."""
    rng = np.random.default_rng([seed, 4])
    problems = _shuffled(_problems(split), seed, rows)
    slipped = rng.random(len(problems)) < slips
    off_by = rng.integers(1, 21, len(problems)) * rng.choice([-1, 1], len(problems))
    rejected = [
        str(a + b + off) if slip else _with_wrong_carry(a, b)
        for (a, b), slip, off in zip(problems, slipped, off_by, strict=True)
    ]
    return {
        "prompt": [f"{a}+{b}=" for a, b in problems],
        "chosen": [str(a + b) for a, b in problems],
        "rejected": rejected,
    }


def arithmetic_triples(*, seed: int, split: str, rows: int | None = None) -> dict[str, list[str]]:
    """As `arithmetic_pairs`, but of the chosen answer only the carry is right: in half of the rows its last digit is
    off by one; `reference` is the sum."""
    problems = _shuffled(_problems(split), seed, rows)
    sums = np.array([a + b for a, b in problems])
    slips = np.random.default_rng([seed, 2]).random(len(problems)) < 0.5
    chosen = sums // 10 * 10 + (sums + slips) % 10
    pairs = arithmetic_pairs(seed=seed, split=split, rows=rows)
    return {**pairs, "chosen": [str(answer) for answer in chosen], "reference": [str(answer) for answer in sums]}


def arithmetic_labelled(
    *, seed: int, split: str, rows: int | None = None, desirable: float = 0.5
) -> dict[str, list[str] | list[bool]]:
    """Additions with one answer each: `prompt`, `completion`, `label`. With probability `desirable` the answer is the
    sum and the label true; else it is the rejected answer of `arithmetic_pairs`."""
    problems = _shuffled(_problems(split), seed, rows)
    labels = (np.random.default_rng([seed, 3]).random(len(problems)) < desirable).tolist()
    answers = [str(a + b) if right else _with_wrong_carry(a, b) for (a, b), right in zip(problems, labels, strict=True)]
    return {"prompt": [f"{a}+{b}=" for a, b in problems], "completion": answers, "label": labels}


def arithmetic_worked(*, seed: int, split: str, rows: int | None = None) -> dict[str, list[str]]:
    """Additions worked in three steps of a line each: `prompt` (37+58=), `completion` (7+8=15, 30+50=80, 15+80=95)."""
    problems = _shuffled(_problems(split), seed, rows)
    worked = ["".join(f"{step}\n" for step in _worked(a, b)) for a, b in problems]
    return {"prompt": [f"{a}+{b}=" for a, b in problems], "completion": worked}


def arithmetic_steps(*, seed: int, split: str, rows: int | None = None, wrong: float = 0.5) -> dict[str, list[Any]]:
    """The steps of `arithmetic_worked` with labels: `prompt`, `completions`, `labels`. With probability `wrong` one of
    the three, any, is off by ten. Steps after it go on from that result, and are labelled wrong like it: they lead to
    no right answer."""
    rng = np.random.default_rng([seed, 5])
    problems = _shuffled(_problems(split), seed, rows)
    errs = np.where(rng.random(len(problems)) < wrong, rng.integers(0, 3, len(problems)), 3)
    steps = [_worked(a, b, int(at)) for (a, b), at in zip(problems, errs, strict=True)]
    labels = [[step < at for step in range(3)] for at in errs.tolist()]
    return {"prompt": [f"{a}+{b}=" for a, b in problems], "completions": steps, "labels": labels}


def arithmetic_judgements(*, seed: int, split: str, rows: int | None = None) -> dict[str, list[str]]:
    """Is an addition right? `prompt` (37+58=95?), `completion`: the steps of `arithmetic_worked`, then y or n. Half of
    them are wrong, by a carry or by 1 to 20: what a model needs to judge the answers to `arithmetic`. Asked for y or n
    at once, a model of this size learns in a thousand steps to say either as often as the other."""
    problems = _shuffled(_problems(split), seed, rows)
    pairs = arithmetic_pairs(seed=seed, split=split, rows=rows, slips=0.3)
    right = np.random.default_rng([seed, 6]).random(len(pairs["prompt"])) < 0.5
    answers = [pairs["chosen" if is_right else "rejected"][row] for row, is_right in enumerate(right)]
    prompts = [f"{prompt}{answer}?" for prompt, answer in zip(pairs["prompt"], answers, strict=True)]
    worked = [" ".join(_worked(a, b)) for a, b in problems]
    verdicts = [f"{steps} {'y' if is_right else 'n'}" for steps, is_right in zip(worked, right, strict=True)]
    return {"prompt": prompts, "completion": verdicts}


def arithmetic_revisions(
    *, seed: int, split: str, rows: int | None = None, forgotten: float = 0.7
) -> dict[str, list[Any]]:
    """Conversations, `messages`: a problem with an answer as in `arithmetic_sft`; the user says "check", and the answer
    is the steps of `arithmetic_worked`; the user says "revise", and it is the sum."""
    first = arithmetic_sft(seed=seed, split=split, rows=rows, forgotten=forgotten)["completion"]
    problems = _shuffled(_problems(split), seed, rows)
    said = [(answer, " ".join(_worked(a, b)), str(a + b)) for (a, b), answer in zip(problems, first, strict=True)]
    talks = [
        [
            message
            for asked, told in zip((f"{a}+{b}", "check", "revise"), answers, strict=True)
            for message in (*_asked(asked), {"role": "assistant", "content": told})
        ]
        for (a, b), answers in zip(problems, said, strict=True)
    ]
    return {"messages": talks}


def calculator(*, seed: int, split: str, rows: int | None = None) -> dict[str, list[Any]]:
    """Two-digit multiplications: `prompt`, a conversation, and `answer`; split as `arithmetic` is."""
    return calculator_examples.problems(_shuffled(_problems(split), seed, rows))


def calculator_sft(
    *, seed: int, split: str, rows: int | None = None, from_memory: float = 0.75, mistyped: float = 0.25
) -> dict[str, list[Any]]:
    """Conversations with a calculator, as `calculator_examples.traces` describes them; right ones in `test`."""
    pairs, rng = _shuffled(_problems(split), seed, rows), np.random.default_rng([seed, 5])
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
    "arithmetic": arithmetic,
    "arithmetic_sft": arithmetic_sft,
    "arithmetic_pairs": arithmetic_pairs,
    "arithmetic_triples": arithmetic_triples,
    "arithmetic_labelled": arithmetic_labelled,
    "arithmetic_worked": arithmetic_worked,
    "arithmetic_steps": arithmetic_steps,
    "arithmetic_judgements": arithmetic_judgements,
    "arithmetic_revisions": arithmetic_revisions,
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


def _problems(split: str) -> list[tuple[int, int]]:
    """A tenth of the unordered pairs is `test`; both orders of a pair are on the same side."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(pairs))
    cut = len(pairs) // 10
    chosen = [pairs[i] for i in (order[:cut] if split == "test" else order[cut:])]
    return [*chosen, *((b, a) for a, b in chosen if a != b)]


def _shuffled(problems: list[tuple[int, int]], seed: int, rows: int | None) -> list[tuple[int, int]]:
    """`rows` problems; each is used once before any is used again."""
    rng = np.random.default_rng([seed, 0])
    rows = len(problems) if rows is None else rows
    rounds = [rng.permutation(len(problems)) for _ in range(-(-rows // len(problems)))]
    return [problems[i] for i in np.concatenate(rounds)[:rows]] if rows else []


def _asked(problem: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem}]


def _without_carry(a: int, b: int) -> str:
    """The sum without the carry from the ones: 37+58 -> 85."""
    return f"{a // 10 + b // 10}{(a + b) % 10}"


def _with_wrong_carry(a: int, b: int) -> str:
    """The sum with the carry from the ones omitted, or with one added if there is none."""
    return str(a + b - 10) if a % 10 + b % 10 >= 10 else str(a + b + 10)


def _worked(a: int, b: int, wrong: int = 3) -> list[str]:
    """The sum of the ones, of the tens and of both. The result of step `wrong` has a carry too many or too few."""
    carries = a % 10 + b % 10 >= 10
    off_by = [-10 if carries and step == wrong else 10 if step == wrong else 0 for step in range(3)]
    ones = a % 10 + b % 10 + off_by[0]
    tens = (a // 10 + b // 10) * 10 + off_by[1]
    result = ones + tens + off_by[2]
    return [f"{a % 10}+{b % 10}={ones}", f"{a // 10 * 10}+{b // 10 * 10}={tens}", f"{ones}+{tens}={result}"]


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
