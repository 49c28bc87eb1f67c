"""A second model beside vLLM's own: token by token, its logits go into those that vLLM samples from.

    vLLM's step:  its model ──► logits [R, V] ──► logits processors ──► temperature, truncation, sampling
                                                     │
                     the second model, in the same process: the same tokens so far ──► its logits [V]

vLLM runs one model per engine. Its interface for logits processors tells which requests are in the batch, with their
prompts and, by reference, the tokens sampled so far; that is what a model of transformers needs to say what comes next.
It keeps keys and values of each running sample, and reads one token a step; samples are read one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.engine import EngineSpec
from rollout.transformers_model import copy_weights, read_model

if TYPE_CHECKING:
    from vllm import SamplingParams

MIXTURE = "mixture"  # in the `extra_args` of a request: the share of the second model


@dataclass
class Reading:
    """How far the second model has read a sample. `tokens` grow: the list is vLLM's own."""

    share: float
    prompt: list[int]
    tokens: list[int]
    weights: int = -1  # which loading of the weights the cache is of
    read: int = 0  # tokens of prompt and sample that are in the cache
    cache: Any = None


class SecondModel:
    """Used by the thread that owns the engine."""

    def __init__(self, spec: EngineSpec, path: str, device: torch.device) -> None:
        self._model = read_model(spec, path).to(device)
        self._device = device
        self._loads = 0

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Samples that are running are read again from their start."""
        copy_weights(self._model, weights)
        self._loads += 1

    @torch.inference_mode()
    def next_logits(self, sample: Reading) -> Tensor:
        """[V] float32: what it says comes after the tokens so far."""
        if sample.weights != self._loads:
            sample.weights, sample.read, sample.cache = self._loads, 0, None
        unread = [*sample.prompt, *sample.tokens][sample.read :]
        ids = torch.tensor([unread], device=self._device)
        output = self._model(input_ids=ids, past_key_values=sample.cache, use_cache=True, logits_to_keep=1)
        sample.cache, sample.read = output.past_key_values, sample.read + len(unread)
        return output.logits[0, -1].float()

    def processor(self) -> type:
        """A class of logits processors, as vLLM builds one in each engine."""
        from vllm.v1.sample.logits_processor import LogitsProcessor
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        second = self

        class Mixture(LogitsProcessor):
            def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
                self._readings: dict[int, Reading] = {}  # by row of the batch

            def is_argmax_invariant(self) -> bool:
                return False

            def update_state(self, batch_update: Any) -> None:
                process_dict_updates(self._readings, batch_update, _reading)

            def apply(self, logits: Tensor) -> Tensor:
                for row, sample in self._readings.items():
                    logits[row] = mixed_row(logits[row], second.next_logits(sample), sample.share)
                return logits

        return Mixture


def mixed_row(own: Tensor, other: Tensor, share: float) -> Tensor:
    """[V]: the logits of the geometric mixture; minus infinity in rows of a padded vocabulary that `other` lacks."""
    size = min(len(own), len(other))
    result = own.new_full(own.shape, -torch.inf)
    result[:size] = own[:size].lerp(other[:size], share)
    return result


def _reading(params: SamplingParams, prompt: list[int] | None, tokens: list[int]) -> Reading | None:
    share = (params.extra_args or {}).get(MIXTURE, 0.0)
    return Reading(share, prompt or [], tokens) if share else None
