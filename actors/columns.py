"""The vocabulary of a batch: one line per column.

Index convention, fixed here once: entry `x[t]` of a per-token column concerns *predicting* token `t` from the tokens
before it in the same row. So `mask[0]` of a row is always 0 and `logps[0]` is always 0.0. The one exception are steps:
`step_label[t]` and what a `step_scalar` head gives concern the step that ends with token `t`, and the model has read
that token. The only place where indices are shifted is `actors/forward.py`, which matches hidden states with what they
predict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

ROUTES = "routed_experts"  # where experts were chosen by the sampler
SPLIT = frozenset({"episode", "earlier_reward"})  # where each turn of an episode is a row of its own
STEP_REWARDS = frozenset({"process_reward", "process_weight", "outcome_reward"})  # where steps are rewarded one by one
ADMITTED = "admitted_ids"  # where sampling cut the distribution: the tokens that it left


class Axis(StrEnum):
    """The unit of a column's entries."""

    TOKEN = "token"  # flat over all rows: [T]
    ROW = "row"  # one per sequence: [B]


class Head(StrEnum):
    """The output of a model's last layer."""

    VOCABULARY = "vocabulary"  # of each token: its log-probability
    TOKEN_SCALAR = "token_scalar"  # of each token: one number, before it is read (a state's value)
    STEP_SCALAR = "step_scalar"  # of each token: one number, once it is read (whether a step that ends here is right)
    ROW_SCALAR = "row_scalar"  # of each row: one number, at its last token (a reward model's score)

    @property
    def per_row(self) -> bool:
        return self is Head.ROW_SCALAR


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its name, axis, dtype, what it holds (with unit), which stage writes it, and whether an entry is one
    number or, if it is `wide`, k of them."""

    name: str
    axis: Axis
    dtype: np.dtype
    holds: str
    writer: str
    wide: bool = False


def _token(name: str, dtype: type, holds: str, writer: str, *, wide: bool = False) -> Column:
    return Column(name, Axis.TOKEN, np.dtype(dtype), holds, writer, wide)


def _row(name: str, dtype: type, holds: str, writer: str, *, wide: bool = False) -> Column:
    return Column(name, Axis.ROW, np.dtype(dtype), holds, writer, wide)


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        _token("tokens", np.int32, "token ids, prompt and completion", "source, generate"),
        _token("mask", np.bool_, "1 where the token is learned from", "source, generate"),
        _token("sample_logps", np.float32, "log-probability under the sampler, nats", "generate"),
        _token(
            ADMITTED, np.int32, "the tokens that sampling could draw; -1 fills up, or admits all", "generate", wide=True
        ),
        _token(ROUTES, np.int16, "the token's own experts, layer by layer; -1: not known", "generate", wide=True),
        _token("version", np.int32, "weights version that produced the token; -1 on prompts", "generate"),
        _token("old_logps", np.float32, "log-probability under the policy before this batch's updates, nats", "infer"),
        _token("ref_logps", np.float32, "log-probability under the reference, nats", "infer"),
        _token("teacher_logps", np.float32, "log-probability under the teacher, nats", "infer"),
        _token("teacher_topk_ids", np.int32, "the k tokens that the teacher finds most likely", "infer", wide=True),
        _token(
            "teacher_topk_logps", np.float32, "log-probabilities of those under the teacher, nats", "infer", wide=True
        ),
        _token(
            "teacher_tail_logps",
            np.float32,
            "log-probability of all other tokens together, -inf if none; one of each teacher",
            "infer",
            wide=True,
        ),
        _token("values", np.float32, "state value before the token, before this batch's updates", "infer"),
        _token("step_reward", np.float32, "reward of the token itself", "score, credit"),
        _token(
            "turn_reward", np.float32, "what an environment gave for a turn, at its last token, weighted", "generate"
        ),
        _token("advantages", np.float32, "advantage of the token", "credit"),
        _token("returns", np.float32, "return from the token on", "credit"),
        _token("step_label", np.int8, "process label at a step's last token: 0, 1, or -1 for none", "source"),
        _row(
            "group", np.int64, "rows that belong together: samples of one prompt, the two of a pair", "source, generate"
        ),
        _row("sample", np.int32, "which of its group's samples the row is of, as they were scored", "generate"),
        _row("episode", np.int64, "which episode of its group the row is a turn of", "generate"),
        _row(
            "earlier_reward",
            np.float32,
            "what an environment gave for earlier turns of the episode, weighted",
            "generate",
        ),
        _row("sampler", np.int8, "which of the pipeline's generate stages sampled the row", "generate"),
        _row(
            "learned", np.bool_, "false: nothing of the row is learned from, and its tokens are not counted", "credit"
        ),
        _row("reward", np.float32, "weighted sum of the rewards; NaN where unscorable", "score"),
        _token(
            "process_reward",
            np.float32,
            "probability, by a process reward model, that the step which ends there is right; NaN where none ends",
            "score",
        ),
        _row("process_weight", np.float32, "what the rewards of steps weigh, the same in every row", "score"),
        _row(
            "outcome_reward", np.float32, "weighted sum of the rewards that are not of steps; NaN without any", "score"
        ),
        _row("reward_parts", np.float32, "each reward by itself; NaN where it has no opinion", "score", wide=True),
        _row("reward_weights", np.float32, "what each of them weighs, the same in every row", "score", wide=True),
        _row(
            "optimal_value", np.float32, "what the prompt is worth under the best policy near the reference", "regroup"
        ),
        _row(
            "win_rate", np.float32, "share of its siblings that a judge finds worse; NaN without such a judge", "score"
        ),
        _row("preference", np.float32, "probability that the row is preferred to its opponent's", "regroup"),
        _row("preferred", np.bool_, "of a pair: the chosen one", "source, regroup"),
        _row("label", np.bool_, "unpaired preference: desirable", "source"),
        _row("imitated", np.bool_, "of a triple: the completion that is imitated", "source"),
        _row(
            "mismatched", np.bool_, "a prompt with another prompt's completion, to estimate a KL divergence", "source"
        ),
        _row("margin", np.float32, "by how much the chosen one is better", "source, regroup"),
        _row("truncated", np.bool_, "the completion hit its length limit", "generate"),
        _row("completion_tokens", np.int32, "tokens that were sampled", "generate"),
        _row("weight", np.float32, "weight of the row in the loss", "source"),
        _row(
            "teacher_prompt",
            np.int32,
            "what the teacher reads instead of the row's prompt (see actors/other_prompts.py)",
            "generate",
            wide=True,
        ),
        _row("teacher_row_tokens", np.int32, "tokens of the row as its teacher reads it", "generate, credit"),
        _row("demonstration", np.int32, "the row whose completion the teacher is shown; -1: none", "credit"),
        _row("teacher", np.int8, "which of the phase's teachers the row is for, from 0", "source"),
    )
}
