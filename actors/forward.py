"""One forward pass over a flat micro-batch. The only place where a token is paired with the state that predicts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from actors.batch import Batch
from actors.columns import ADMITTED, ROUTES, Head
from actors.distributions import Asked, TopK
from actors.errors import RunError
from actors.model import LanguageModel
from actors.objective import MicroBatch, OfLogits, Outputs
from actors.transfers import on_device

NOT_EXTRA = frozenset({"main", "aux_loss", "rows"})  # of what a model returns


def forward(
    model: Callable[..., Mapping[str, Tensor]],
    micro: MicroBatch,
    *,
    head: Head = Head.VOCABULARY,
    temperature: float = 1.0,
    needs: frozenset[str] = frozenset(),
    chunk_rows: int | None = None,
    all_tokens: bool = False,
    of_logits: OfLogits | None = None,
    companion: LanguageModel | None = None,
    top_k: TopK | None = None,
) -> Outputs:
    """Outputs by the convention of `actors/columns.py`: entry t of `T` tokens concerns predicting token t. A number per
    row [B] is said at the row's last token; a step's number [T] at the step's own last token.

    `model` is a `LanguageModel` with that head, or a backend's wrapper of one. Only tokens whose `mask` is 1 are given
    to the head, the others' entries are 0; `all_tokens`, or a batch without a mask, means every token but each row's
    first. `chunk_rows` bounds how many tokens' logits exist at a time (default: `actors.logits.chunk_logits`).
    `of_logits` says what is made of whole distributions, which may be those of a `companion`, too: a frozen model.
    If the batch says which tokens could be drawn (`actors.columns.ADMITTED`), distributions are over these alone.
    `top_k`, in a pass without gradient: the most likely tokens of each distribution; nothing else is computed.
    """
    tokens = micro["tokens"]
    if head is Head.ROW_SCALAR:
        predicted = micro.offsets[1:]  # the state after a row's last token
    else:
        predicted = predicted_tokens(micro, all_tokens=all_tokens or "all_tokens" in needs)
    read = predicted + 1 if head is Head.STEP_SCALAR else predicted  # the head is given the states before these tokens
    asked = top_k if of_logits is None else _asked(of_logits, micro, predicted, companion, temperature)
    needs = needs - {"all_tokens"}
    admitted = micro[ADMITTED].index_select(0, predicted) if head is Head.VOCABULARY and ADMITTED in micro else None
    routes = micro.columns.get(ROUTES)
    on_host = None if micro.host is None else micro.host["tokens"]
    found = model(tokens, micro.row_lengths, read, temperature, needs, chunk_rows, asked, admitted, routes, on_host)

    def over_all_tokens(values: Tensor) -> Tensor:
        return values.new_zeros(len(tokens), *values.shape[1:]).index_copy(0, predicted, values)

    extra = {name: over_all_tokens(values) for name, values in found.items() if name not in NOT_EXTRA}
    main = found["main"] if head is Head.ROW_SCALAR else over_all_tokens(found["main"])
    return Outputs(main, extra, found.get("aux_loss"), int(found["rows"]))


def forward_padded(
    model: Callable[..., Mapping[str, Tensor]],
    rows: Sequence[np.ndarray],
    *,
    head: Head,
    length: int,
    count: int,
    device: torch.device,
) -> list[np.ndarray]:
    """What a scalar head says of each of the `rows` (of token ids), by the convention above: one number [], or one per
    token. The pass has `count` rows of `length` tokens whatever the rows are, of which there may be fewer."""
    assert head in (Head.ROW_SCALAR, Head.STEP_SCALAR), f"a pass of one shape is for scores, not for {head}"
    tokens, ends = np.zeros((count, length), np.int64), np.ones(count, np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], ends[place] = row, len(row)
    everywhere = np.arange(count * length) if head is Head.STEP_SCALAR else np.arange(count) * length + ends - 1
    flat, read = on_device(tokens.reshape(-1), device), on_device(everywhere + 1, device)
    found = model(flat, (length,) * count, read, 1.0, frozenset(), share=False)["main"].float().cpu().numpy()
    if head is Head.ROW_SCALAR:
        return list(found[: len(rows)])
    return [said[: len(row)] for row, said in zip(rows, found.reshape(count, length), strict=False)]


def _asked(
    of_logits: OfLogits, micro: MicroBatch, predicted: Tensor, companion: LanguageModel | None, temperature: float
) -> Asked:
    """What the model's head is to make of its logits. A dummy has nothing to predict, and no columns."""
    call = of_logits.at(temperature)
    if not len(predicted):
        return Asked(call, width=of_logits.width)
    columns = tuple(micro[name].index_select(0, predicted) for name in of_logits.columns)
    if not of_logits.companion:
        return Asked(call, columns, width=of_logits.width)
    if companion is None:
        raise RunError("the objective compares with a companion, and the role was started without one")
    beside = companion.states(micro["tokens"], micro.row_lengths, predicted)
    return Asked(call, columns, beside, of_logits.width)


def predicted_tokens(micro: MicroBatch, *, all_tokens: bool = False) -> Tensor:
    """[N] int64, ascending: indices of the tokens whose prediction is computed. Never a row's first token. Found on the
    host where it has the rows: how many there are is not known to a GPU's host before the GPU has counted them."""
    if micro.host is not None:
        return on_device(_predicted_on_host(micro.host, all_tokens), micro["tokens"].device)
    wanted = torch.ones_like(micro["tokens"], dtype=torch.bool)
    if "mask" in micro and not all_tokens:
        wanted = micro["mask"].clone()
    starts = micro.offsets[:-1]
    wanted[starts[micro.lengths > 0]] = False
    return wanted.nonzero().squeeze(1)


def _predicted_on_host(batch: Batch, all_tokens: bool) -> np.ndarray:
    learned = "mask" in batch and not all_tokens
    wanted = batch["mask"].astype(np.bool_) if learned else np.ones(batch.num_tokens, np.bool_)
    wanted[batch.offsets[:-1][batch.lengths > 0]] = False
    return np.flatnonzero(wanted)
