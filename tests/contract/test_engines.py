"""What every engine must do, on each of them: samples and their log-probabilities, seeds, ends, limits, new weights.

Log-probabilities are compared with transformers' forward pass: within 1e-4 in float32; in bfloat16 within 0.1, and
0.02 on average.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import DataFailure, InfraFailure
from rollout.sampling import Finish, Request, Sampling
from rollout.short_samples import shape_of
from rollout.stopping import resolved_stops
from rollout.vllm_engine import CPU_HEAD_SIZES
from tests.contract.engine_stage import (
    EOS,
    LONG_PROMPT,
    MAX_CONCURRENCY,
    MAX_MODEL_LEN,
    PROMPT,
    Subject,
    on,
    subject,
    subjects,
)
from tests.unit.tiny import tiny_tokenizer

__all__ = ["subject", "subjects"]  # fixtures


MODELS = ("vllm-tied", "vllm-untied", "hf-tied", "hf-untied")
ENGINES = ("vllm-tied", "hf-tied", "scripted")


@on(*MODELS, "vllm-two-ranks")
def test_greedy_tokens_are_the_models_argmax(subject: Subject) -> None:
    completion = subject.one(Request("greedy", PROMPT, 1, Sampling(40, temperature=0), seed=1))
    assert completion.tokens.tolist() == subject.logits(PROMPT, completion).argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@on(*MODELS)
def test_sampled_log_probabilities_equal_those_of_the_model(subject: Subject, temperature: float) -> None:
    for completion in subject.run(Request("a", PROMPT, 4, Sampling(32, temperature=temperature), seed=2))["a"]:
        assert subject.error(PROMPT, completion, temperature).max() < 1e-4


@on("vllm-bf16", "hf-bf16")
def test_sampled_log_probabilities_in_bfloat16_are_close_to_those_of_the_model(subject: Subject) -> None:
    samples = subject.run(Request("a", PROMPT, 4, Sampling(32), seed=2))["a"]
    errors = np.concatenate([subject.error(PROMPT, completion) for completion in samples])
    assert errors.max() < 0.1
    assert errors.mean() < 0.02


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}])
@on("vllm-tied", "hf-tied")
def test_a_truncated_distribution_is_renormalised_over_the_tokens_it_keeps(
    subject: Subject, cut: dict[str, Any]
) -> None:
    completion = subject.one(Request("cut", PROMPT, 1, Sampling(32, **cut), seed=3))
    probs = subject.logits(PROMPT, completion).softmax(-1)
    for place, (token, logp) in enumerate(zip(completion.tokens, completion.logps, strict=True)):
        kept = kept_tokens(probs[place], **cut)
        assert kept[token]
        assert logp == pytest.approx((probs[place, token] / probs[place][kept].sum()).log().item(), abs=1e-3)


def kept_tokens(probs: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """[V] bool, from the definitions: the k likeliest; the fewest that reach p; those near the likeliest."""
    likelier = torch.tensor([probs[probs > prob].sum() for prob in probs])
    rank = torch.tensor([int((probs > prob).sum()) for prob in probs])
    return (
        (rank < top_k if top_k else torch.ones_like(probs).bool()) & (likelier < top_p) & (probs >= min_p * probs.max())
    )


@on("vllm-bf16-head", "hf-bf16-head", "vllm-bf16", "hf-bf16")
def test_a_head_in_float32_does_not_round_logits_to_half_precision(subject: Subject) -> None:
    """Of two tokens that may be drawn, the log-probability of one says by how much their logits differ. Logits of 1 and
    more have at most 7 bits behind the point in bfloat16."""
    samples = subject.run(Request("a", PROMPT, 4, Sampling(32, top_k=2), seed=2))["a"]
    chances = np.exp(np.concatenate([completion.logps for completion in samples]).astype(np.float64))
    between = chances[(chances > 0.02) & (chances < 0.98)]
    steps = 2**7 * np.log(between / (1 - between))
    rounded = float((np.abs(steps - steps.round()) < 0.02).mean())
    assert len(between) > 40
    assert rounded < 0.2 if subject.spec.lm_head_fp32 else rounded > 0.9


@on("vllm-tied", "hf-tied")
def test_a_mixture_is_refused_by_an_engine_with_one_model(subject: Subject) -> None:
    with pytest.raises(DataFailure, match="it mixes two models"):
        subject.engine.add(Request("mixed", PROMPT, 1, Sampling(4), seed=1, mixture=0.5))
    assert not subject.engine.busy


@on(*ENGINES)
def test_a_seed_fixes_the_samples_and_another_seed_gives_others(subject: Subject) -> None:
    sampling = Sampling(24)
    first, again = (subject.run(Request("a", PROMPT, 3, sampling, seed=4))["a"] for _ in range(2))
    other = subject.run(Request("a", PROMPT, 3, sampling, seed=5))["a"]
    assert [c.tokens.tolist() for c in first] == [c.tokens.tolist() for c in again]
    assert all(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(first, other, strict=True))
    assert len({tuple(c.tokens) for c in first}) == 3


@on(*ENGINES)
def test_samples_do_not_depend_on_what_else_is_running(subject: Subject) -> None:
    request = Request("a", PROMPT, 4, Sampling(24), seed=6)
    alone = subject.run(request)["a"]
    others = [Request(f"other-{i}", PROMPT[i:] + PROMPT, 3, Sampling(10 + i), seed=i) for i in range(4)]
    crowded = subject.run(*others[:2], request, *others[2:])["a"]
    assert [c.tokens.tolist() for c in alone] == [c.tokens.tolist() for c in crowded]


@on("hf-tied", "hf-untied")
def test_the_hf_engine_repeats_log_probabilities_bit_for_bit_whatever_else_is_in_the_batch(subject: Subject) -> None:
    """Short requests share passes with others, whose prompts have the same padded length and others; long ones do
    not."""
    short = Request("short", PROMPT, 4, Sampling(24), seed=6)
    shortest = Request("shortest", PROMPT, 4, Sampling(12), seed=6)
    long = Request("long", LONG_PROMPT, 4, Sampling(24), seed=6)
    crowd = [Request(f"crowd-{i}", PROMPT[i % 4 :] * (1 + i % 3), 5, Sampling(3 + 5 * i), seed=i) for i in range(6)]
    for request in (shortest, short, long):
        alone = subject.run(request)[request.id]
        crowded = subject.run(*crowd[:2], request, *crowd[2:])[request.id]
        assert all(np.array_equal(a.logps, b.logps) for a, b in zip(alone, crowded, strict=True))


@pytest.mark.parametrize("together", [True, False])
@on("hf-tied", "hf-bf16")
def test_short_requests_take_the_steps_of_the_longest_and_others_run_one_after_the_other(
    subject: Subject, together: bool
) -> None:
    budget = 20 if together else 150
    for name in "ab":
        subject.engine.add(Request(name, PROMPT, 3, Sampling(budget), seed=ord(name)))
    steps, lengths = 0, dict[str, int]()
    while subject.engine.busy:
        steps += 1
        for finished in subject.engine.step():
            lengths[finished.request.id] = max(len(completion.tokens) for completion in finished.completions)
    assert min(lengths.values()) > 1
    assert steps == (max(lengths.values()) if together else sum(lengths.values()))


@pytest.mark.parametrize("budget", [12, 30])
@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT, (*PROMPT, *PROMPT[:3]), LONG_PROMPT[:25]])
@on("hf-tied", "hf-untied")
def test_short_samples_in_passes_of_one_shape_are_the_first_tokens_of_long_ones(
    subject: Subject, prompt: tuple[int, ...], budget: int
) -> None:
    """A request that may become long is decoded by itself, from a cache that grows."""
    room = MAX_MODEL_LEN - len(prompt)
    assert shape_of(len(prompt), budget) is not None and shape_of(len(prompt), room) is None
    short, long = (
        subject.run(Request("a", prompt, 6, Sampling(tokens, top_k=50), seed=3))["a"] for tokens in (budget, room)
    )
    assert max(len(completion.tokens) for completion in long) > budget
    for one, other in zip(short, long, strict=True):
        size = len(one.tokens)
        assert one.tokens.tolist() == other.tokens[:size].tolist()
        np.testing.assert_allclose(one.logps, other.logps[:size], atol=1e-5)


@on(*ENGINES)
def test_a_request_gets_as_many_samples_as_it_asked_for_and_more_samples_change_none(subject: Subject) -> None:
    four = subject.run(Request("a", PROMPT, 4, Sampling(16), seed=7))["a"]
    two = subject.run(Request("a", PROMPT, 2, Sampling(16), seed=7))["a"]
    assert [c.index for c in four] == [0, 1, 2, 3]
    assert [c.tokens.tolist() for c in four[:2]] == [c.tokens.tolist() for c in two]


@on(*ENGINES)
def test_a_sample_ends_with_the_first_stop_token_and_keeps_it(subject: Subject) -> None:
    request = Request("free", PROMPT, 1, Sampling(40), seed=8)
    free = subject.one(request).tokens.tolist()
    stop = free[min(6, len(free) - 1)]
    ended = subject.one(replace(request, sampling=Sampling(40, stop_token_ids=(stop,))))
    assert ended.tokens.tolist() == free[: free.index(stop) + 1]
    assert ended.finish is Finish.STOP


@on("vllm-tied", "hf-tied")
def test_a_sample_ends_with_the_token_that_completes_a_stop_string(subject: Subject) -> None:
    request = Request("free", PROMPT, 1, Sampling(40), seed=8)
    free = subject.one(request).tokens.tolist()
    stop = tiny_tokenizer().decode(free[4:6])
    ended = subject.one(replace(request, sampling=Sampling(40, stop=("never said", stop))))
    assert len(stop) == 2
    assert ended.tokens.tolist() == free[:6]
    assert ended.finish is Finish.STOP


@on("vllm-tied", "hf-tied")
def test_a_sample_ends_with_a_stop_string_that_is_a_special_token(subject: Subject) -> None:
    """As the plan resolves it: the model's own padding token, which no engine has among the text that it searches."""
    wanted = Sampling(48, stop=("<pad>",))
    samples = subject.run(Request("a", PROMPT, 32, resolved_stops(wanted, tiny_tokenizer(), 64), seed=9))["a"]
    stopped = [completion for completion in samples if completion.tokens[-1] == 0]
    assert stopped and all(completion.finish is Finish.STOP for completion in stopped)
    assert all(0 not in completion.tokens[:-1] for completion in samples)


@on(*ENGINES)
def test_samples_end_with_the_end_of_sequence_or_at_their_limit_and_report_which(subject: Subject) -> None:
    samples = subject.run(Request("a", PROMPT, 32, Sampling(48), seed=9))["a"]
    for completion in samples:
        ended = completion.tokens[-1] == EOS
        assert EOS not in completion.tokens[:-1]
        assert completion.finish is (Finish.STOP if ended else Finish.LENGTH)
        assert ended or len(completion.tokens) == 48
    assert {completion.finish for completion in samples} == {Finish.STOP, Finish.LENGTH}


@on(*ENGINES)
def test_a_prompt_without_room_for_a_token_is_a_data_failure(subject: Subject) -> None:
    for prompt in ((7,) * MAX_MODEL_LEN, ()):
        with pytest.raises(DataFailure, match=f"{len(prompt)} tokens.*max_model_len"):
            subject.engine.add(Request("long", prompt, 2, Sampling(4), seed=1))
    assert not subject.engine.busy


@on("vllm-tied", "hf-tied")
def test_a_token_outside_the_vocabulary_is_a_data_failure_and_the_engine_keeps_serving(subject: Subject) -> None:
    with pytest.raises(DataFailure, match="vocab"):
        subject.engine.add(Request("stray", (5, 64), 2, Sampling(4), seed=1))
    assert set(subject.run(Request("good", PROMPT, 2, Sampling(4), seed=1))) == {"good"}


@on(*ENGINES)
def test_a_sample_is_no_longer_than_the_context_leaves_room_for(subject: Subject) -> None:
    prompt = tuple(2 + place % 50 for place in range(MAX_MODEL_LEN - 3))
    for completion in subject.run(Request("tight", prompt, 8, Sampling(100), seed=11))["tight"]:
        assert len(completion.tokens) <= 3
        assert completion.finish is (Finish.STOP if completion.tokens[-1] == EOS else Finish.LENGTH)


@on(*ENGINES)
def test_requests_beyond_the_concurrency_limit_all_finish(subject: Subject) -> None:
    requests = [Request(f"r{i}", PROMPT, 3, Sampling(6), seed=i) for i in range(3 * MAX_CONCURRENCY)]
    requests.append(Request("wide", PROMPT, 2 * MAX_CONCURRENCY + 1, Sampling(6), seed=0))
    results = subject.run(*requests)
    assert {name: len(samples) for name, samples in results.items()} == {r.id: r.n for r in requests}


@on(*ENGINES)
def test_more_prompt_tokens_than_fit_into_one_step_are_no_obstacle_to_seeded_samples(subject: Subject) -> None:
    prompts = [tuple(2 + (7 * place + shift) % 60 for place in range(200)) for shift in range(1, 5)]
    requests = [Request(f"burst/{i}", prompt, 2, Sampling(4), seed=i) for i, prompt in enumerate(prompts)]
    assert {name: len(samples) for name, samples in subject.run(*requests).items()} == {r.id: 2 for r in requests}


@on(*ENGINES)
def test_an_aborted_request_never_finishes_and_the_others_do(subject: Subject) -> None:
    doomed, kept = (Request(name, PROMPT, 2, Sampling(12), seed=12) for name in ("doomed", "kept"))
    subject.engine.add(doomed)
    subject.engine.add(kept)
    subject.engine.step()
    subject.engine.abort("doomed")
    subject.engine.abort("unknown")
    assert set(subject.finish()) == {"kept"}
    assert set(subject.run(doomed)) == {"doomed"}, "its id is free again"


@on(*ENGINES)
def test_every_token_carries_the_version_that_produced_it(subject: Subject) -> None:
    subject.engine.add(Request("a", LONG_PROMPT, 2, Sampling(20), seed=14))
    for _ in range(3):
        subject.engine.step()
    subject.load(subject.other_weights(1), 1)
    subject.engine.step()
    subject.load(subject.other_weights(2), 5)
    for completion in subject.finish()["a"]:
        assert len(completion.tokens) > 4
        assert completion.versions.tolist() == [0, 0, 0, 1] + [5] * (len(completion.tokens) - 4)
    assert subject.engine.version == 5


@on(*MODELS, "vllm-two-ranks")
def test_tokens_sampled_after_new_weights_arrive_have_exactly_the_new_log_probabilities(subject: Subject) -> None:
    subject.engine.add(Request("a", LONG_PROMPT, 3, Sampling(20), seed=14))
    for _ in range(4):
        subject.engine.step()
    subject.load(subject.other_weights(1), 1)
    for completion in subject.finish()["a"]:
        error = subject.error(LONG_PROMPT, completion)
        assert error[completion.versions == 1].max() < 1e-4
        assert error[completion.versions == 0].max() > 1e-2, "the two versions do not differ: this test shows nothing"


@on(*MODELS, "vllm-two-ranks")
def test_greedy_tokens_follow_new_weights_although_the_prompt_was_cached_and_requests_were_running(
    subject: Subject,
) -> None:
    greedy = Request("greedy", LONG_PROMPT, 1, Sampling(24, temperature=0), seed=1)
    before = subject.one(greedy)
    for version in (1, 2):
        subject.engine.add(Request("running", LONG_PROMPT, 2, Sampling(30), seed=15))
        subject.engine.step()
        subject.load(subject.other_weights(version), version)
        after = subject.run(greedy)["greedy"][0]
        assert after.tokens.tolist() == subject.logits(LONG_PROMPT, after).argmax(-1).tolist()
        assert after.tokens.tolist() != before.tokens.tolist()


@on(*MODELS)
def test_weights_that_lack_a_parameter_are_refused_and_a_complete_set_is_accepted_afterwards(subject: Subject) -> None:
    with pytest.raises(InfraFailure, match="not sent"):
        subject.engine.load([pair for pair in subject.original if "layers.1.mlp.down_proj" not in pair[0]], 3)
    subject.load(subject.original, 4)
    completion = subject.one(Request("a", PROMPT, 1, Sampling(16), seed=16))
    assert subject.error(PROMPT, completion).max() < 1e-4


def test_the_head_sizes_that_a_plan_allows_on_a_cpu_are_vllm_s_own() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
