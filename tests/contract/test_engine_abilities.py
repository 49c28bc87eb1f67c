"""What an engine can do beyond the contract: say what truncation left or what was likely in a prompt, mix two models,
take adapters alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.lora import adapter_tensors, attach, full_tensors
from rollout.sampling import Completion, Request, Sampling
from tests.contract.engine_stage import LONG_PROMPT, PROMPT, Subject, on, subject, subjects

__all__ = ["subject", "subjects"]  # fixtures


@on("vllm-cut", "hf-tied")
def test_each_token_comes_with_the_tokens_that_truncation_left(subject: Subject) -> None:
    cut: dict[str, Any] = {"top_k": 6, "top_p": 0.5, "min_p": 0.1}
    sampling = Sampling(24, temperature=0.8, replay_truncation=True, **cut)
    sizes = set[int]()
    for completion in subject.run(Request("cut", PROMPT, 3, sampling, seed=3))["cut"]:
        assert completion.admitted is not None and completion.admitted.shape == (len(completion.tokens), 6)
        probs = (subject.logits(PROMPT, completion) / 0.8).softmax(-1)
        for place, ids in enumerate(completion.admitted):
            kept = kept_one_after_the_other(probs[place])
            assert set(ids[ids >= 0].tolist()) == kept and completion.tokens[place] in kept
            logp = float((probs[place, completion.tokens[place]] / probs[place, sorted(kept)].sum()).log())
            assert completion.logps[place] == pytest.approx(logp, abs=1e-3)
            sizes.add(len(kept))
    assert len(sizes) > 2, "the cut is always of one size: this test shows little"
    whole = subject.one(Request("whole", PROMPT, 1, Sampling(4, **cut), seed=3))
    assert whole.admitted is None


def kept_one_after_the_other(probs: torch.Tensor) -> set[int]:
    """min_p, then the 6 likeliest, then the fewest that reach a half of what is left by then."""
    kept = [int(token) for token in probs.argsort(descending=True) if probs[token] >= 0.1 * probs.max()][:6]
    left = (probs[kept] / probs[kept].sum()).cumsum(0)
    return set(kept[: 1 + int((left < 0.5).sum())])


@on("vllm-cut", "hf-tied")
def test_of_each_token_of_a_prompt_an_engine_says_which_ones_were_likeliest_there(subject: Subject) -> None:
    """Also of a prompt whose keys and values are in a prefix cache, beside requests that ask nothing, and of new
    weights."""

    def check(name: str) -> torch.Tensor:
        asked = [Request(f"{name}/{k}", LONG_PROMPT, 1, Sampling(1), seed=1, prompt_top_k=k) for k in (5, 2, 0)]
        found = {key: samples[0].prompt for key, samples in subject.run(*asked).items()}
        assert found[f"{name}/0"] is None
        with torch.no_grad():
            logps = subject.reference(torch.tensor([LONG_PROMPT])).logits[0, :-1].float().log_softmax(-1)
        for k in (5, 2):
            said = found[f"{name}/{k}"]
            assert said is not None and said.ids.shape == said.logps.shape == (len(LONG_PROMPT) - 1, k)
            np.testing.assert_allclose(said.logps, logps.topk(k).values, atol=1e-4)
            np.testing.assert_allclose(said.logps, logps.gather(1, torch.tensor(said.ids).long()), atol=1e-4)
            np.testing.assert_allclose(said.own, logps[range(len(logps)), LONG_PROMPT[1:]], atol=1e-4)
        return logps

    subject.run(Request("before", LONG_PROMPT, 1, Sampling(4), seed=1))
    first, again = check("first"), check("again")
    assert torch.equal(first, again)
    subject.load(subject.other_weights(4), 1)
    assert (check("other weights") - first).abs().max() > 1e-2


@on("vllm-mixing", "hf-mixing")
def test_every_token_of_a_mixture_is_drawn_from_the_normalised_product_of_both_models(subject: Subject) -> None:
    """Also after new weights of either, in the middle of samples; and requests without a mixture know nothing of it."""
    from transformers import AutoModelForCausalLM

    second = AutoModelForCausalLM.from_pretrained(subject.spec.mixes).eval()
    original = [(name, parameter.detach().clone()) for name, parameter in second.named_parameters()]
    shares = {"half": 0.5, "most": 0.8, "none": 0.0}

    def mixed(completion: Completion, share: float) -> torch.Tensor:
        ids = torch.tensor([[*PROMPT, *completion.tokens]])
        with torch.no_grad():
            other = second(ids).logits[0, len(PROMPT) - 1 : -1]
        return ((1 - share) * subject.logits(PROMPT, completion) + share * other).log_softmax(-1)

    def errors(completion: Completion, share: float) -> np.ndarray:
        chosen = mixed(completion, share).gather(1, torch.tensor(completion.tokens, dtype=torch.long)[:, None])
        return np.abs(chosen[:, 0].numpy() - completion.logps)

    def requests(name: str) -> list[Request]:
        return [Request(f"{name}/{of}", PROMPT, 3, Sampling(16), seed=9, mixture=share) for of, share in shares.items()]

    def check(results: dict[str, list[Completion]], since: int = 0) -> None:
        for name, completions in results.items():
            share = shares[name.partition("/")[2]]
            assert all(errors(completion, share)[since:].max(initial=0) < 1e-4 for completion in completions)
            other = max(errors(completion, 0.3)[since:].max(initial=0) for completion in completions)
            assert other > 1e-2, "the mixtures do not differ: this test shows nothing"

    check(subject.run(*requests("first")))
    for request in requests("moved"):
        subject.engine.add(request)
    subject.engine.step()
    torch.manual_seed(3)
    others = [(name, tensor + 0.1 * torch.randn_like(tensor)) for name, tensor in original]
    second.load_state_dict(dict(others), strict=False)
    subject.engine.load_second(others)
    subject.load(subject.other_weights(2), 1)
    check(subject.finish(), since=1)
    greedy = subject.one(Request("greedy", PROMPT, 1, Sampling(8, temperature=0), seed=1, mixture=0.5))
    assert greedy.tokens.tolist() == mixed(greedy, 0.5).argmax(-1).tolist()
    subject.engine.load_second(original)


@on("vllm-adapters", "hf-adapters", "hf-dora")
def test_adapters_alone_give_the_samples_of_the_weights_with_them_merged(subject: Subject) -> None:
    """Twice, and for a request that is running when the second ones come: each of its tokens is of one version."""
    from transformers import AutoModelForCausalLM

    trained: Any = AutoModelForCausalLM.from_pretrained(subject.spec.model, dtype=torch.float32).eval()
    assert subject.spec.lora is not None
    attach(trained, subject.spec.lora)

    def load(version: int) -> None:
        torch.manual_seed(version)
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        merged = dict(full_tensors(trained, 1 << 20))
        subject.reference.load_state_dict(merged, strict=False)
        subject.engine.load_adapters([(name, each.clone()) for name, each in adapter_tensors(trained, 1000)], version)

    def greedy() -> Completion:
        found = subject.one(Request("greedy", PROMPT, 1, Sampling(40, temperature=0), seed=1))
        assert found.tokens.tolist() == subject.logits(PROMPT, found).argmax(-1).tolist()
        assert subject.error(PROMPT, found).max() < 1e-4
        return found

    load(1)
    first = greedy()
    subject.engine.add(Request("running", PROMPT, 2, Sampling(40), seed=2))
    for _ in range(4):
        subject.engine.step()
    load(2)
    moved = subject.finish()["running"]
    for completion in moved:
        since = completion.versions == 2
        assert since.any() and not since.all(), "the adapters came when no sample was running"
        assert subject.error(PROMPT, completion)[since].max() < 1e-4
    second = greedy()
    assert first.tokens.tolist() != second.tokens.tolist(), "the adapters change nothing: this test shows nothing"
    assert set(first.versions) == {1} and set(second.versions) == {2}
