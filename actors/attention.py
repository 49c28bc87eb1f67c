"""Attention over a flat micro-batch: documents are concatenated in one row and never attend to one another.

    tokens      a a a a b b c c c            one row, no padding: every linear layer works on real tokens only
    buckets     [a a a a]  [c c c]           attention itself runs on documents of like length, right-padded to the
                           [b b .]           longest of their bucket; causality alone keeps the padding out of sight

A padded key comes after every real query of its document, so causal attention ignores it; a padded query's output is
never read, so it has no gradient. So no mask is needed, and the fast kernels apply.

If documents have a shared prefix (`actors/prefixes.py`), the model computes it once; attention, which is cheap compared
with the rest, expands its rows to whole documents and collects one row of each again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.errors import ModelError
from actors.prefixes import SharedPrefixes
from actors.scored_attention import scored_attention
from actors.transfers import on_device

VARLEN = "troupe_varlen"  # the name of this attention in transformers
HALF = (torch.float16, torch.bfloat16)
MIN_FILL = 0.5  # a document joins a bucket if it is at least that part of the bucket's longest (see `Documents`)


@dataclass(frozen=True)
class Bucket:
    """`count` documents padded to `length` tokens each, from slot `start` of the padded buffer on."""

    start: int
    count: int
    length: int


class Documents:
    """The layout of the documents of a flat micro-batch: `positions` [T] restart at each; `slots` [T] are their places
    in the padded buffer of all buckets. Built once per forward pass, used by every layer. The model computes one row
    per token, or with `shared` only the rows that are kept.

    Buckets trade padding (cheap, because documents are short) for fewer kernel calls (expensive on a CPU). With 48
    documents of 10 to 128 tokens, buckets filled at least by half were as fast as one bucket for all, and 1.4 times as
    fast as buckets of equal lengths only; unlike a single bucket they bound the padding when lengths differ widely."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        shared: SharedPrefixes | None = None,
        attention_dtype: torch.dtype | None = None,
    ) -> None:
        self.lengths = list(lengths)
        self.device = device
        self.shared = shared
        self.attention_dtype = attention_dtype  # of queries, keys and values; None: as they come
        self.longest = max(self.lengths, default=0)

    @cached_property
    def positions(self) -> Tensor:
        lengths = torch.tensor(self.lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return on_device(torch.arange(len(starts)) - starts, self.device)

    @cached_property
    def boundaries(self) -> Tensor:
        """[B+1] int32, cumulative lengths, for kernels with variable lengths."""
        return on_device(F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int(), self.device)

    @cached_property
    def buckets(self) -> list[Bucket]:
        return self._layout[0]

    @cached_property
    def slots(self) -> Tensor:
        return self._layout[1]

    @cached_property
    def num_slots(self) -> int:
        return sum(bucket.count * bucket.length for bucket in self.buckets)

    @cached_property
    def already_padded(self) -> bool:
        """True if all documents have the same length and no shared prefix: the flat rows are the padded buffer."""
        return self.shared is None and len(self.buckets) == 1 and self.num_slots == sum(self.lengths)

    @cached_property
    def row_of_slot(self) -> Tensor:
        """With `shared`: the row that fills each slot. The values of the padding are never used."""
        assert self.shared is not None
        rows = torch.zeros(self.num_slots, dtype=torch.int64, device=self.device)
        return rows.index_copy(0, self.slots, self.shared.row_of_token)

    @cached_property
    def slot_of_row(self) -> Tensor:
        """One slot of each row, from which its output is read."""
        return self.slots if self.shared is None else self.slots[self.shared.kept]

    def of_rows(self, per_token: Tensor) -> Tensor:
        """[T] -> [R]: the values of the computed rows."""
        return per_token if self.shared is None else per_token[self.shared.kept]

    def at_tokens(self, rows: Tensor, index: Tensor) -> Tensor:
        """[R, H], [N] -> [N, H]: the rows that stand for these tokens."""
        return rows.index_select(0, index) if self.shared is None else spread(rows, self.shared.row_of_token[index])

    @cached_property
    def _layout(self) -> tuple[list[Bucket], Tensor]:
        buckets: list[Bucket] = []
        first_slot = torch.zeros(len(self.lengths), dtype=torch.int64)
        start = 0
        for members in _alike(self.lengths):
            length = self.lengths[members[0]]
            buckets.append(Bucket(start, len(members), length))
            first_slot[members] = start + length * torch.arange(len(members))
            start += length * len(members)
        return buckets, first_slot.to(self.device).repeat_interleave(self.boundaries.diff()) + self.positions


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of documents, longest first, in buckets; a new one begins at a document that is too short for the
    bucket's longest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[index] >= MIN_FILL * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def spread(rows: Tensor, index: Tensor) -> Tensor:
    """[R, ...], [N] -> [N, ...]: rows repeated as the index says. Implemented as an embedding, whose gradient sums
    repeated rows faster than that of a selection."""
    return F.embedding(index, rows.flatten(1)).unflatten(1, rows.shape[1:])


class _Unpad(torch.autograd.Function):
    """[slots] -> [T]. The gradient of an ordinary selection adds rows one by one; slots are distinct, so copying is
    enough."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_slots, *grad.shape[1:]).index_copy_(0, slots, grad), None


def varlen_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document -> [1, T, heads, head_dim], the layout of transformers. `s_aux` [heads] are
    sinks."""
    if unknown := sorted(name for name in ("head_mask", "position_bias") if options.get(name) is not None):
        raise ModelError(
            f"{type(module).__name__} gives its attention {', '.join(unknown)}, which the packed attention does not "
            "compute; use a model of another architecture"
        )
    window = sliding_window if sliding_window is not None and sliding_window < documents.longest else None
    dtype = query.dtype
    q, k, v = (states[0].transpose(0, 1).to(documents.attention_dtype or dtype) for states in (query, key, value))
    by_kernel = softcap is None and s_aux is None
    if by_kernel and query.is_cuda and q.dtype in HALF and dropout == 0:
        return _flat_attention(q, k, v, documents, scaling, window)[None].to(dtype), None
    if by_kernel:
        attend = partial(_kernel_of_a_bucket, dropout=dropout, scaling=scaling, window=window)
    else:
        attend = partial(
            scored_attention, scaling=scaling, softcap=softcap, sinks=s_aux, window=window, dropout=dropout
        )
    return _bucket_attention(q, k, v, documents, attend)[None].to(dtype), None


def _flat_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """The kernel's attention, on whole documents."""
    if documents.shared is None:
        return _kernel_attention(query, key, value, documents, scaling, window)
    query, key, value = (spread(rows, documents.shared.row_of_token) for rows in (query, key, value))
    return _Unpad.apply(_kernel_attention(query, key, value, documents, scaling, window), documents.shared.kept)


def _kernel_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """PyTorch's flash attention for variable lengths (GPU, half precision). Rows are [T, heads, head_dim]. It is what
    `torch.nn.attention.varlen.varlen_attn` calls; that is an operation in Python both ways, and its overhead was 8 % of
    a step of 10,000 tokens."""
    bounds, longest = documents.boundaries, documents.longest
    size = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, window is None, False, scale=scaling, **size
    )[0]


def _bucket_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`attend` is called for each bucket, with [count, heads, length, head_dim]."""
    dtype = query.dtype
    if dtype in HALF and not query.is_cuda:  # the CPU kernel's gradient is several times slower in half precision
        query, key, value = (rows.float() for rows in (query, key, value))
    if not documents.already_padded:
        query, key, value = (_pad(rows, documents) for rows in (query, key, value))
    outputs = []
    for bucket in documents.buckets:
        out = attend(*(_documents_of(rows, bucket) for rows in (query, key, value)))
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    whole = outputs[0] if documents.already_padded else _Unpad.apply(torch.cat(outputs), documents.slot_of_row)
    return whole.to(dtype)


def _kernel_of_a_bucket(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    mask = _window_mask(query.shape[2], window, query.device)
    gqa = query.shape[1] != key.shape[1]
    if gqa and query.is_cuda:  # in float32, the only kernel for grouped heads is the one that holds every score
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
        gqa = False
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, mask is None, scale=scaling, enable_gqa=gqa)


def _pad(rows: Tensor, documents: Documents) -> Tensor:
    if documents.shared is not None:
        return spread(rows, documents.row_of_slot)
    return rows.new_zeros(documents.num_slots, *rows.shape[1:]).index_copy(0, documents.slots, rows)


def _documents_of(rows: Tensor, bucket: Bucket) -> Tensor:
    """[slots, heads, head_dim] -> [count, heads, length, head_dim], without a copy."""
    part = rows[bucket.start : bucket.start + bucket.count * bucket.length]
    return part.view(bucket.count, bucket.length, *rows.shape[1:]).transpose(1, 2)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The keys that a query attends to in a sliding window: its own and the `window - 1` before it."""
    if window is None:
        return None
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)


def register() -> None:
    """Make `attn_implementation="troupe_varlen"` known to transformers; a forward pass then takes `documents=`. Nothing
    is registered for its mask, so transformers makes none, and does not look for packed documents in the positions."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)
