"""When a completion ends, decided in one place for the engines that decode themselves, and as ids for those that do
not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from actors.errors import ConfigError, DataFailure
from actors.pretrained import load_config, load_tokenizer
from rollout.sampling import Finish, Request, Sampling

TOKENS_PER_CHARACTER = 4  # at most, in a byte-level vocabulary (UTF-8)


def token_budget(request: Request, max_model_len: int) -> int:
    """How many tokens each sample may have: `max_tokens`, or what the context leaves. Raises DataFailure if it leaves
    nothing, or if there is no prompt to continue."""
    room = max_model_len - len(request.prompt)
    if room < 1 or not request.prompt:
        raise DataFailure(
            f"request {request.id}: a prompt of {len(request.prompt)} tokens cannot be continued within max_model_len "
            f"= {max_model_len} (roles.rollout.max_model_len): it takes 1 to {max_model_len - 1}"
        )
    return min(request.sampling.max_tokens, room)


def end_token_ids(model: str, trust_remote_code: bool = False) -> tuple[int, ...]:
    """The ids that end a sequence: the generation configuration's if the model has one, else the model
    configuration's."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ids = None
    if ids is None:
        ids = load_config(model, trust_remote_code).get_text_config().eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def resolved_stops(sampling: Sampling, tokenizer: Any, vocab: int, key: str = "sampling") -> Sampling:
    """The same stop conditions as every engine can see them: a stop string that is a special token is that token's id,
    because special tokens are not part of the text that is searched for strings.

    Raises ConfigError for a string that can never be met, or that is met at once, and for an id of no token of a model
    with `vocab` of them. `key` is where the sampling was set."""
    special = {str(token): int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts: list[str] = []
    ids = list(sampling.stop_token_ids)
    for stop in sampling.stop:
        if not stop:
            raise ConfigError(f"{key}.stop holds an empty text, which ends every completion at once; leave it out")
        if stop in special:
            ids.append(special[stop])
            continue
        inside = [token for token in special if token in stop]
        if inside:
            raise ConfigError(
                f"{key}.stop={stop!r} holds the special token {inside[0]!r} beside other text: special tokens are no "
                f"text, so it would never be met; give {inside[0]!r} by itself"
            )
        texts.append(stop)
    for index in ids:
        if not 0 <= index < vocab:
            raise ConfigError(
                f"{key}.stop_token_ids: {index} is no token of the model, whose ids are 0 to {vocab - 1}; "
                "correct it, or leave it out"
            )
    return replace(sampling, stop=tuple(texts), stop_token_ids=tuple(dict.fromkeys(ids)))


class StopRule:
    """Ends the samples of one model. Holds the tokenizer, which is read when a stop string is met for the first
    time."""

    def __init__(self, model: str, end_ids: Iterable[int], trust_remote_code: bool = False) -> None:
        self._model, self._trust = model, trust_remote_code
        self._end_ids = frozenset(end_ids)

    def finish(self, tokens: Sequence[int], sampling: Sampling, budget: int) -> Finish | None:
        """Why a sample ends with the last of `tokens`, or None if it goes on."""
        if tokens[-1] in self._end_ids or tokens[-1] in sampling.stop_token_ids:
            return Finish.STOP
        if sampling.stop and self._has_stop_string(tokens, sampling.stop):
            return Finish.STOP
        return Finish.LENGTH if len(tokens) >= budget else None

    def _has_stop_string(self, tokens: Sequence[int], stops: tuple[str, ...]) -> bool:
        """Only the end is decoded: earlier tokens were looked at when they were the end."""
        reach = TOKENS_PER_CHARACTER * (max(map(len, stops)) + 1)
        text = self._tokenizer.decode(list(tokens[-reach:]), skip_special_tokens=True)
        return any(stop in text for stop in stops)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._model, self._trust)
