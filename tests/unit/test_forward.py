from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from actors.attention import VARLEN, Documents, register, varlen_attention
from actors.batch import Batch
from actors.errors import ModelError
from actors.forward import forward
from actors.heads import LogitScaling, VocabularyHead
from actors.model import LanguageModel, ModelSpec, load_model, prepare
from actors.objective import MicroBatch
from actors.scored_attention import scored_attention
from tests.unit.tiny import tiny_model, tiny_model_folder

LENGTHS = [7, 1, 12, 7, 30, 2]
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def language_model(causal: Any = None, **settings: Any) -> LanguageModel:
    register()
    causal = tiny_model() if causal is None else causal
    causal.config._attn_implementation = VARLEN
    return prepare(causal, ModelSpec("in memory", **settings), trainable=True)


def rows(lengths: list[int] = LENGTHS, seed: int = 0, vocab: int = 64, mask: Any = None) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, vocab, (sum(lengths),), generator=generator)
    columns = {} if mask is None else {"mask": mask}
    return MicroBatch.of(Batch.build(lengths, tokens=tokens.numpy(), **columns))


def plain_logits(causal: Any, micro: MicroBatch, attention: str = "eager") -> list[Tensor]:
    """Each row by itself through the model as transformers computes it."""
    causal.config._attn_implementation = attention
    logits = [causal(input_ids=row[None]).logits[0] for row in micro["tokens"].split(micro.lengths.tolist())]
    causal.config._attn_implementation = VARLEN
    return logits


def plain_log_probs(causal: Any, micro: MicroBatch, temperature: float = 1.0) -> Tensor:
    """[T, V]: entry t is the distribution that predicts token t; rows' first entries are 0."""
    parts = [torch.log_softmax(logits / temperature, -1)[:-1] for logits in plain_logits(causal, micro)]
    return torch.cat([torch.cat([part.new_zeros(1, part.shape[-1]), part]) for part in parts])


def plain_logps(causal: Any, micro: MicroBatch, temperature: float = 1.0) -> Tensor:
    return plain_log_probs(causal, micro, temperature).gather(1, micro["tokens"][:, None]).squeeze(1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_those_of_each_row_by_itself(tied: bool, temperature: float) -> None:
    causal = tiny_model(tied=tied)
    micro = rows()
    found = forward(language_model(causal), micro, temperature=temperature)
    torch.testing.assert_close(found.logps, plain_logps(causal, micro, temperature), **FLOAT32)


@pytest.mark.parametrize("lengths", [[9], [5, 5, 5], [30, 3], [64, 60, 33, 31, 8, 8, 1]])
def test_every_layout_of_documents_gives_the_same_logps(lengths: list[int]) -> None:
    causal = tiny_model()
    micro = rows(lengths)
    torch.testing.assert_close(forward(language_model(causal), micro).logps, plain_logps(causal, micro), **FLOAT32)


def test_attention_in_half_precision_rounds_only_queries_keys_and_values() -> None:
    causal, micro = tiny_model(), rows()
    exact = forward(language_model(causal), micro).logps
    half = forward(LanguageModel(causal, attention_dtype="bfloat16"), micro).logps
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(half, exact)


def test_packed_documents_never_attend_to_one_another() -> None:
    model = language_model()
    with torch.no_grad():
        before = forward(model, rows([10, 20, 15], seed=1))
        other = rows([10, 20, 15], seed=2)
        other["tokens"][10:30] = rows([10, 20, 15], seed=1)["tokens"][10:30]  # the middle one stays
        after = forward(model, other)
    assert torch.equal(before.logps[10:30], after.logps[10:30])
    assert not torch.equal(before.logps[:10], after.logps[:10])


def test_later_tokens_do_not_change_earlier_predictions() -> None:
    model = language_model()
    micro = rows([12, 12])
    with torch.no_grad():
        before = forward(model, micro).logps.clone()
        micro["tokens"][8] = (micro["tokens"][8] + 1) % 64
        after = forward(model, micro).logps
    assert torch.equal(before[:8], after[:8])
    assert not torch.isclose(before[8:12], after[8:12]).any()


def test_a_row_s_first_token_and_unmasked_tokens_have_logp_zero() -> None:
    mask = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    mask[[0, 3, 4, 25]] = True  # 0 is a row's first: it must be ignored
    micro = rows(mask=mask.numpy())
    model = language_model()
    masked, everything = forward(model, micro).logps, forward(model, micro, all_tokens=True).logps
    assert masked.nonzero().squeeze(1).tolist() == [3, 4, 25]
    torch.testing.assert_close(masked[[3, 4, 25]], everything[[3, 4, 25]])
    starts = micro.offsets[:-1]
    assert (everything[starts] == 0).all()
    assert (everything != 0).sum() == sum(LENGTHS) - len(LENGTHS)


def test_without_a_token_to_predict_outputs_and_gradient_are_zero() -> None:
    model = language_model()
    outputs = forward(model, rows([1]), needs=frozenset({"entropy"}))
    outputs.logps.sum().backward()
    assert outputs.logps.tolist() == [0.0]
    assert outputs.extra["entropy"].tolist() == [0.0]
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_extras_equal_their_definitions() -> None:
    causal = tiny_model()
    micro = rows()
    needs = frozenset({"entropy", "log_sum_sq_probs", "mean_logits", "is_top1"})
    with torch.no_grad():
        found = forward(language_model(causal), micro, temperature=0.8, needs=needs)
        log_probs = plain_log_probs(causal, micro, 0.8)
        logits = [torch.cat([part.new_zeros(1, 64), part[:-1]]) for part in plain_logits(causal, micro)]
    real = found.logps != 0
    expected = {
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": log_probs.exp().square().sum(-1).log(),
        "mean_logits": torch.cat(logits).mean(-1) / 0.8,
        "is_top1": (log_probs.argmax(-1) == micro["tokens"]).float(),
    }
    assert found.extra.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found.extra[name][real], values[real], **FLOAT32, msg=lambda m, n=name: f"{n}: {m}")
        assert (found.extra[name][~real] == 0).all()


def test_entropy_has_a_gradient_only_on_request() -> None:
    model = language_model()
    assert not forward(model, rows(), needs=frozenset({"entropy"})).extra["entropy"].requires_grad
    assert forward(model, rows(), needs=frozenset({"entropy_grad"})).extra["entropy"].requires_grad


@pytest.mark.parametrize("chunk_rows", [None, 7])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_plain_autograd(chunk_rows: int | None, tied: bool) -> None:
    causal = tiny_model(tied=tied)
    model = language_model(causal)
    micro = rows()
    weights = torch.linspace(-1, 1, sum(LENGTHS))

    log_probs = plain_log_probs(causal, micro, 0.9)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    entropy = entropy.where(plain_logps(causal, micro) != 0, 0.0)
    logps = log_probs.gather(1, micro["tokens"][:, None]).squeeze(1)
    expected = gradients(model, (weights * logps).sum() + 0.3 * (weights * entropy).sum())

    found = forward(model, micro, temperature=0.9, needs=frozenset({"entropy_grad"}), chunk_rows=chunk_rows)
    loss = (weights * found.logps).sum() + 0.3 * (weights * found.extra["entropy"]).sum()
    assert_same_gradients(expected, gradients(model, loss))


@pytest.mark.parametrize(
    "scaling", [LogitScaling(0.3), LogitScaling(softcap=2.0), LogitScaling(1.7, softcap=3.0)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_scaled_and_capped_logits_equal_plain_autograd(
    scaling: LogitScaling, bias: bool, chunk_rows: int | None
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 20, bias=bias)
    hidden = torch.randn(10, 8, requires_grad=True)
    targets = torch.randint(0, 20, (10,))
    weights = torch.linspace(-1, 1, 10)
    inputs = [hidden, *linear.parameters()]

    logits = scaling.multiplier * linear(hidden)
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    logps = torch.log_softmax(logits / 0.7, -1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad((weights * logps).sum(), inputs)

    found = VocabularyHead(linear, scaling)(hidden, targets, 0.7, frozenset(), chunk_rows)["main"]
    torch.testing.assert_close(found, logps)
    torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), inputs), expected)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_distribution_over_the_admitted_tokens_alone_equals_plain_autograd(chunk_rows: int | None) -> None:
    """Log-probability, entropy and gradients; a row of -1 alone is restricted to nothing less than all tokens."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 20)
    hidden = torch.randn(10, 8, requires_grad=True)
    inside = torch.rand(10, 20).argsort(-1)[:, :6]
    admitted = inside.masked_fill(torch.rand(10, 6) < 0.4, -1)
    admitted[:, 0], admitted[4] = inside[:, 0], -1
    targets, inputs = inside[:, 0], [hidden, *linear.parameters()]

    said: list[Tensor] = []
    for row, ids in enumerate(admitted):
        kept = ids[ids >= 0] if (ids >= 0).any() else torch.arange(20)
        log_probs = torch.log_softmax(linear(hidden[row])[kept] / 0.7, -1)
        entropy = -(log_probs.exp() * log_probs).sum()
        said.append(log_probs[(kept == targets[row]).nonzero()[0, 0]] + 0.3 * entropy)
    expected = torch.stack(said)

    head, needs = VocabularyHead(linear, LogitScaling()), frozenset({"entropy", "entropy_grad"})
    found = head(hidden, targets, 0.7, needs, chunk_rows, None, admitted)
    values = found["main"] + 0.3 * found["entropy"]
    torch.testing.assert_close(values, expected)
    weights = torch.linspace(-1, 1, 10)
    of_plain, of_head = (torch.autograd.grad((weights * each).sum(), inputs) for each in (expected, values))
    torch.testing.assert_close(of_head, of_plain)
    whole = head(hidden, targets, 0.7, needs, chunk_rows)
    assert (whole["main"] < found["main"] - 0.1).sum() == 9, "of the tenth, all tokens are admitted"


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_head_in_float32_computes_with_states_and_weights_of_half_precision_as_if_they_had_more(
    chunk_rows: int | None,
) -> None:
    torch.manual_seed(0)
    linear, exact = torch.nn.Linear(64, 50).bfloat16(), torch.nn.Linear(64, 50)
    exact.load_state_dict(linear.state_dict())
    hidden, targets = (4 * torch.randn(10, 64)).bfloat16(), torch.randint(0, 50, (10,))

    def gradient(head: VocabularyHead, states: Tensor) -> tuple[Tensor, ...]:
        states = states.clone().requires_grad_()
        logps = head(states, targets, 1.0, frozenset(), chunk_rows)["main"]
        return logps, *torch.autograd.grad(logps.sum(), [states, *head.parameters()])

    expected = gradient(VocabularyHead(exact, LogitScaling()), hidden.float())
    found = gradient(VocabularyHead(linear, LogitScaling(float32=True)), hidden)
    rounded = gradient(VocabularyHead(linear, LogitScaling()), hidden)
    torch.testing.assert_close(found[0], expected[0])
    for mine, wanted in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype is torch.bfloat16
        torch.testing.assert_close(mine.float(), wanted, rtol=1e-2, atol=1e-2)
    assert (rounded[0] - expected[0]).abs().max() > 1e-2 > 10 * (found[0] - expected[0]).abs().max()


class Largest(TorchDispatchMode):
    """The element count of the largest tensor that any operation produced."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.numel = max([self.numel, *(each.numel() for each in found if isinstance(each, Tensor))])
        return result


def test_the_logits_of_all_tokens_never_exist_at_once() -> None:
    vocab, tokens, chunk = 4096, 256, 16
    model = language_model(tiny_model(vocab=vocab, hidden=16, layers=1))
    with Largest() as largest:
        forward(model, rows([tokens], vocab=vocab), chunk_rows=chunk).logps.sum().backward()
    assert largest.numel == vocab * chunk < vocab * tokens


def test_a_sliding_window_masks_tokens_further_back() -> None:
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    causal = Qwen2ForCausalLM(config)
    micro = rows([3, 20, 9])
    found = forward(language_model(causal), micro).logps
    torch.testing.assert_close(found, plain_logps(causal, micro), **FLOAT32)
    for layer in causal.model.layers:
        layer.self_attn.sliding_window = None
    assert not torch.allclose(found, forward(language_model(causal), micro).logps, atol=1e-2)


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5, "sliding_window": 5,
}  # fmt: skip


def tiny_gemma2(**settings: Any) -> Any:
    """Its scores are far beyond the cap."""
    torch.manual_seed(0)
    config: dict[str, Any] = {**SMALL, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **settings}
    return Gemma2ForCausalLM(Gemma2Config(**{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, **config}))


def tiny_gpt_oss() -> Any:
    torch.manual_seed(0)
    causal = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, eos_token_id=1))
    for layer in causal.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=2.0)
    return causal


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_gpt_oss])
def test_capped_scores_and_sinks_are_computed_packed_as_transformers_does_row_by_row(make: Callable[[], Any]) -> None:
    causal = make()
    micro = rows([3, 20, 9, 1])
    model = language_model(causal, router_aux_loss_coef=0.0)
    found, expected = forward(model, micro).logps, plain_logps(causal, micro)
    torch.testing.assert_close(found, expected, **FLOAT32)
    ours, theirs = (gradients(model, logps.sum()) for logps in (found, expected))
    assert_same_gradients(theirs, ours)
    for layer in causal.model.layers:
        layer.self_attn.attn_logit_softcapping = None
        layer.self_attn.sinks = None
    assert not torch.allclose(found, forward(model, micro).logps, atol=1e-2)


def test_rows_that_begin_alike_share_their_computation_under_capped_scores_too() -> None:
    causal = tiny_gemma2()
    prompt = torch.randint(2, 64, (1, 9), generator=torch.Generator().manual_seed(0)).expand(3, 9)
    tokens = rows([14, 14, 14])["tokens"].view(3, 14)
    tokens[:, :9] = prompt
    micro = MicroBatch.of(Batch.build([14, 14, 14], tokens=tokens.flatten().numpy()))
    found = forward(language_model(causal), micro)
    assert found.rows < 3 * 14
    torch.testing.assert_close(found.logps, plain_logps(causal, micro), **FLOAT32)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("block_scores", [1, 100, 2**24])
def test_scored_attention_without_cap_and_sinks_is_the_kernel_s_whatever_the_blocks(
    window: int | None, block_scores: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 13, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    distance = torch.arange(13)[:, None] - torch.arange(13)
    mask = (distance >= 0) & (distance < (window or 13))
    expected = F.scaled_dot_product_attention(*inputs, mask, scale=0.3, enable_gqa=True)
    options: dict[str, Any] = {"scaling": 0.3, "softcap": None, "sinks": None, "window": window}
    found = scored_attention(*inputs, **options, block_scores=block_scores)
    torch.testing.assert_close(found, expected, **FLOAT32)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, **FLOAT32)


@pytest.mark.parametrize("option", ["position_bias", "head_mask"])
def test_features_that_packed_attention_does_not_support_are_refused(option: str) -> None:
    states = torch.zeros(1, 2, 4, 8)
    documents = Documents([4], states.device)
    options: dict[str, Any] = {option: torch.zeros(1)}
    with pytest.raises(ModelError, match=option):
        varlen_attention(torch.nn.Identity(), states, states, states, None, documents=documents, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attentions_of_transformers_keep_documents_apart_too(tmp_path: Any, attention: str) -> None:
    folder = str(tiny_model_folder(tmp_path))
    ours = load_model(ModelSpec(folder), trainable=False)
    theirs = load_model(ModelSpec(folder, attn_implementation=attention), trainable=False)
    micro = rows()
    torch.testing.assert_close(forward(theirs, micro).logps, forward(ours, micro).logps, **FLOAT32)


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02,
        )
    )  # fmt: skip


def test_experts_are_balanced_by_the_model_s_own_loss() -> None:
    causal = tiny_mixtral()
    micro = rows([16])
    found = forward(language_model(causal), micro).aux_loss
    causal.config._attn_implementation = "eager"
    own = causal(input_ids=micro["tokens"][None], output_router_logits=True).aux_loss
    assert found is not None
    torch.testing.assert_close(found, 0.02 * own)
    causal.config._attn_implementation = VARLEN
    assert forward(language_model(causal, router_aux_loss_coef=0.0), micro).aux_loss is None


def test_embedding_noise_is_drawn_in_training_only() -> None:
    model = language_model(neftune_noise_alpha=5.0)
    micro = rows()
    assert not torch.equal(forward(model, micro).logps, forward(model, micro).logps)
    quiet = forward(model.eval(), micro).logps
    assert torch.equal(quiet, forward(model, micro).logps)
    torch.testing.assert_close(quiet, plain_logps(model.causal, micro), **FLOAT32)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    micro = rows()
    plain, checkpointed = language_model(), language_model(gradient_checkpointing=True)
    assert checkpointed.causal.is_gradient_checkpointing
    expected = gradients(plain, forward(plain, micro).logps.sum())
    found = gradients(checkpointed, forward(checkpointed, micro).logps.sum())
    assert_same_gradients(expected, found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": 0.0}, "temperature above 0"), ({"needs": frozenset({"logits"})}, r"\['logits'\].*entropy")],
)
def test_invalid_arguments_of_the_forward_pass_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(language_model(), rows(), **wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "there is no folder"),
        (lambda folder: folder, r"not a model folder\n.*notes.txt\n.*config.json"),
    ],
)
def test_a_folder_without_a_model_is_an_error_of_a_few_lines(
    tmp_path: Any, make: Callable[..., Any], message: str
) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSpec(str(make(tmp_path))), trainable=False)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_model_of_another_kind_is_refused(tmp_path: Any) -> None:
    folder = tiny_model_folder(tmp_path)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match=r"cannot load a model with a vocabulary head.*ViTConfig") as caught:
        load_model(ModelSpec(str(folder)), trainable=False)
    assert len(str(caught.value)) < 500


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.causal.named_parameters() if p.grad is not None}


def assert_same_gradients(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
