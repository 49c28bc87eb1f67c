"""What a large vocabulary costs in memory: a training pass with the chunked projection beside one with plain logits,
and one that compares whole distributions with those of a teacher in the same process (`distilled`), chunked as well,
beside the same from the logits of all tokens of both models (`distilled_plain`).

    python tests/benchmarks/vocabulary.py --vocabularies 32000 151936 --tokens 512 2048 --dtype float32

A small model makes one forward and backward pass over `tokens` tokens, each case in a process of its own. `extra` is
the peak of that pass over what the process held before it, without the gradient of the projection's matrix, which is
there in any case (the embeddings are frozen). `KiB per token` is how much of it each further token costs. With chunks,
a vocabulary of any size should cost per token what a small one does. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import run
from rich.console import Console
from rich.table import Table

HEADS = ("chunked", "plain", "distilled", "distilled_plain")
LAYERS, ROW_TOKENS, WARMUP_TOKENS = 2, 128, 64
MIB = 2**20
TIMEOUT_S = 600.0


def main() -> None:
    options = _options()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return
    results = []
    for head in options.projections:
        for vocabulary in sorted(options.vocabularies):
            for tokens in sorted(options.tokens):
                case = {"head": head, "vocabulary": vocabulary, "tokens": tokens}
                case |= {"dtype": options.dtype, "hidden": options.hidden}
                command = [sys.executable, "-W", "ignore", Path(__file__), "--case", json.dumps(case)]
                output = run(command, {"PYTHONPATH": str(Path(__file__).parents[2])}, TIMEOUT_S).output
                results.append(case | json.loads(output.strip().splitlines()[-1]))
    slopes = {f"{head} {v}": per_token(results, head, v) for head in options.projections for v in options.vocabularies}
    show(results, slopes)
    print(json.dumps({"benchmark": "vocabulary", "results": results, "kib_per_token": slopes}))


def measure(head: str, vocabulary: int, tokens: int, dtype: str, hidden: int) -> dict[str, float]:
    """One case, in this process."""
    import torch

    torch.manual_seed(0)
    model = _model(vocabulary, hidden, getattr(torch, dtype))
    of_head = {"chunked": _chunked_step, "distilled": _distilled_step}
    of_head |= {"plain": _plain_step, "distilled_plain": _plainly_distilled_step}
    step = of_head[head](model)
    step(WARMUP_TOKENS)
    model.zero_grad(set_to_none=True)
    before = _forget_peak()
    began = time.perf_counter()
    step(tokens)
    seconds = time.perf_counter() - began
    gradient = vocabulary * hidden * getattr(torch, dtype).itemsize
    return {"extra_mib": (_peak() - before - gradient) / MIB, "seconds": seconds}


def per_token(results: list[dict[str, Any]], head: str, vocabulary: int) -> float | None:
    """KiB that a further token costs, between the smallest and the largest batch; None of a single one."""
    mine = [r for r in results if (r["head"], r["vocabulary"]) == (head, vocabulary)]
    first, last = mine[0], mine[-1]
    if first is last:
        return None
    return (last["extra_mib"] - first["extra_mib"]) * 1024 / (last["tokens"] - first["tokens"])


def _model(vocabulary: int, hidden: int, dtype: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from actors.attention import VARLEN, register
    from actors.model import ModelSpec, prepare

    register()
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        attn_implementation=VARLEN,
    )
    model = prepare(Qwen2ForCausalLM(config).to(dtype), ModelSpec(""), trainable=True)
    model.causal.get_input_embeddings().requires_grad_(False)
    return model


def _chunked_step(model: Any) -> Callable[[int], None]:
    """As a trainer's step has it."""
    from actors.batch import Batch
    from actors.forward import forward
    from actors.objective import MicroBatch

    def step(tokens: int) -> None:
        lengths, ids = _rows(model, tokens)
        micro = MicroBatch.of(Batch.build(lengths, tokens=ids.tolist()))
        forward(model, micro).logps.sum().neg().backward()

    return step


def _distilled_step(model: Any) -> Callable[[int], None]:
    """Reverse KL from a companion of the same size."""
    from actors.batch import Batch
    from actors.forward import forward
    from actors.objective import MicroBatch, OfLogits
    from orchestrator.losses.distillation import jensen_shannon

    config = model.causal.config
    teacher = _model(config.vocab_size, config.hidden_size, model.causal.dtype).requires_grad_(False)
    asked = OfLogits(jensen_shannon, {"beta": 1.0}, companion=True)

    def step(tokens: int) -> None:
        lengths, ids = _rows(model, tokens)
        micro = MicroBatch.of(Batch.build(lengths, tokens=ids.tolist()))
        found = forward(model, micro, of_logits=asked, companion=teacher)
        found.extra["divergence"].sum().backward()

    return step


def _plain_step(model: Any) -> Callable[[int], None]:
    """The same model's own projection of all tokens, and the log-probabilities from its logits."""
    import torch

    def step(tokens: int) -> None:
        lengths, ids = _rows(model, tokens)
        logits, learned = _logits(model, lengths, ids)
        logps = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[1:, None]).squeeze(1)
        (logps * learned).sum().neg().backward()

    return step


def _plainly_distilled_step(model: Any) -> Callable[[int], None]:
    """The divergence of `_distilled_step`, from the logits of all tokens of both models."""
    import torch

    from orchestrator.losses.distillation import jensen_shannon

    config = model.causal.config
    teacher = _model(config.vocab_size, config.hidden_size, model.causal.dtype).requires_grad_(False)

    def step(tokens: int) -> None:
        lengths, ids = _rows(model, tokens)
        with torch.no_grad():
            said, _ = _logits(teacher, lengths, ids)
        logits, learned = _logits(model, lengths, ids)
        (jensen_shannon(logits.float(), said.float(), beta=1.0) * learned).sum().backward()

    return step


def _logits(model: Any, lengths: list[int], ids: Any) -> tuple[Any, Any]:
    """[T-1, V] of all tokens but the last, and [T-1] whether the next token is one of the same row."""
    from actors.attention import Documents

    documents = Documents(lengths, ids.device)
    positions = documents.positions[None]
    logits = model.causal(ids[None], position_ids=positions, use_cache=False, documents=documents).logits[0, :-1]
    return logits, documents.positions[1:] > 0


def _rows(model: Any, tokens: int) -> tuple[list[int], Any]:
    import torch

    rows, rest = divmod(tokens, ROW_TOKENS)
    lengths = [ROW_TOKENS] * rows + ([rest] if rest else [])
    return lengths, torch.randint(0, model.causal.config.vocab_size, (tokens,))


def _forget_peak() -> int:
    """Let the kernel take the memory in use now for the peak; bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """Bytes, from what the kernel says about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def show(results: list[dict[str, Any]], slopes: dict[str, float | None]) -> None:
    table = Table("projection", "vocabulary", "tokens", "extra MiB", "KiB per token", "s", title="memory of one pass")
    for r in results:
        slope = slopes[f"{r['head']} {r['vocabulary']}"]
        last = r["tokens"] == max(other["tokens"] for other in results)
        table.add_row(
            r["head"],
            f"{r['vocabulary']:,}",
            f"{r['tokens']:,}",
            f"{r['extra_mib']:,.0f}",
            f"{slope:.1f}" if last and slope is not None else "",
            f"{r['seconds']:.2f}",
            end_section=last,
        )
    Console().print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projections", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--hidden", type=int, default=256, help="width of the model's states")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how this script starts itself for one case
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
