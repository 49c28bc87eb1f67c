"""Loading a causal language model, and calling it on flat micro-batches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors import fused_kernels
from actors.attention import VARLEN, Documents, register
from actors.columns import Head
from actors.distributions import Asked, TopK
from actors.errors import ModelError
from actors.heads import ScalarHead, VocabularyHead
from actors.logits import LogitScaling, Vocabulary
from actors.lora import attach
from actors.prefixes import shared_prefixes
from actors.pretrained import load_config, load_pretrained, load_tokenizer, padding_token
from actors.routing import Routers
from actors.specs import LoraSpec

PACKABLE = frozenset({"full_attention", "sliding_attention"})  # kinds of layers, as transformers names them


@dataclass(frozen=True)
class ModelSpec:
    """A model and how it is to be computed. `path` is a Hugging Face folder or hub name. A scalar head that the folder
    does not have is drawn at random."""

    path: str
    head: Head = Head.VOCABULARY
    tokenizer: str | None = None  # default: the model's own
    chat_template: str | None = None  # its text; default: the tokenizer's own
    dtype: str = "float32"
    lora: LoraSpec | None = None
    gradient_checkpointing: bool = False
    neftune_noise_alpha: float = 0.0
    router_aux_loss_coef: float | None = None  # None: the model's own value
    lm_head_fp32: bool = False  # compute logits in float32, whatever the dtype
    trust_remote_code: bool = False
    attn_implementation: str | None = None  # None: the packed attention of `actors/attention.py`
    attention_dtype: str | None = None  # of queries, keys and values in the packed attention; None: the model's
    fused_kernels: bool | None = None  # see `actors/fused_kernels.py`; None: on a GPU


class LanguageModel(nn.Module):
    """A causal language model whose forward pass returns its head's outputs (log-probabilities of tokens, scores) and
    never logits.

    `causal` is the Hugging Face model with its head; exported weights have its parameter names. Parameters are read
    only inside this module's forward pass, so that a backend may partition them outside of it (ZeRO stage 3).
    """

    def __init__(
        self,
        causal: Any,
        *,
        neftune_noise_alpha: float = 0.0,
        router_aux_loss_coef: float | None = None,
        lm_head_fp32: bool = False,
        attention_dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.head: VocabularyHead | ScalarHead
        if hasattr(causal, "score"):
            self.head = ScalarHead(causal.score)
        else:
            scaling = LogitScaling.of(causal.config, float32=lm_head_fp32)
            self.head = VocabularyHead(causal.get_output_embeddings(), scaling)
        self.neftune_noise_alpha = neftune_noise_alpha
        self._attention_dtype = None if attention_dtype is None else getattr(torch, attention_dtype)
        own = getattr(causal.config, "router_aux_loss_coef", None) or 0.0
        self.router_aux_loss_coef: float = own if router_aux_loss_coef is None else router_aux_loss_coef
        self._routers: Routers | None = None
        self._experts = int(getattr(causal.config, "num_experts_per_tok", None) or 0)  # per token and layer
        self.kernels = ""  # what is computed by fused kernels, for the description of the worker
        self._packs = causal.config._attn_implementation == VARLEN
        self._drops_out = bool(getattr(causal.config, "attention_dropout", 0.0)) or any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in causal.get_decoder().modules()
        )

    def forward(
        self,
        tokens: Tensor,
        lengths: tuple[int, ...],
        predicted: Tensor,
        temperature: float = 1.0,
        needs: frozenset[str] = frozenset(),
        chunk_rows: int | None = None,
        asked: Asked | TopK | None = None,
        admitted: Tensor | None = None,
        routes: Tensor | None = None,
        on_host: np.ndarray | None = None,
        share: bool = True,
    ) -> Mapping[str, Tensor]:
        """`tokens` [T] are concatenated documents of `lengths` tokens each. `predicted` [N] are indices of tokens, none
        of them a document's first; the head is given the state before each. `on_host` is a copy of the tokens on the
        host, which saves waiting for the device. Without `share`, equal prefixes are computed as often as they are
        there.

        Returns `main` [N]; the columns [N] that `needs` names, of distributions restricted to the `admitted` tokens
        [N, k] if given; what `asked` requests of whole distributions (`actors/distributions.py`); `aux_loss` (scalar,
        its coefficient applied) if the model balances experts; and `rows` (scalar), the number of tokens that were
        computed, which is below T if prefixes are shared."""
        decoded, documents = self._decode(tokens, lengths, routes, on_host, share)
        hidden = documents.at_tokens(decoded.last_hidden_state[0], predicted - 1)
        if isinstance(self.head, ScalarHead):
            outputs: dict[str, Tensor] = {"main": self.head(hidden)}
        else:
            # One call for everything: a backend that partitions the projection gathers it once, around this call.
            targets = tokens.index_select(0, predicted)
            outputs = dict(self.head(hidden, targets, temperature, needs, chunk_rows, asked, admitted))
        if self.router_aux_loss_coef:
            outputs["aux_loss"] = self.router_aux_loss_coef * self._balancing_loss(decoded.router_logits)
        outputs["rows"] = torch.tensor(decoded.last_hidden_state.shape[1])
        return outputs

    @torch.no_grad()
    def states(self, tokens: Tensor, lengths: tuple[int, ...], predicted: Tensor) -> tuple[Vocabulary, Tensor]:
        """For a model that is another one's companion: its projection, and its states [N, H] before the `predicted`
        tokens, from which the loss computes its distributions chunk by chunk."""
        assert isinstance(self.head, VocabularyHead), "a companion needs a vocabulary head"
        decoded, documents = self._decode(tokens, lengths)
        return self.head.projection, documents.at_tokens(decoded.last_hidden_state[0], predicted - 1)

    def _decode(
        self,
        tokens: Tensor,
        lengths: tuple[int, ...],
        routes: Tensor | None = None,
        on_host: np.ndarray | None = None,
        share: bool = True,
    ) -> tuple[Any, Documents]:
        """`routes` [T, layers x k] are the experts of each token, in place of those that the routers would choose."""
        shared = None
        if share and self._may_share:
            on_host = tokens.cpu().numpy() if on_host is None else on_host
            shared = shared_prefixes(on_host, lengths, tokens.device)
        documents = Documents(lengths, tokens.device, shared, self._attention_dtype)
        if routes is not None:
            self._routers = self._routers or Routers(self.causal)
            self._routers.given = documents.of_rows(routes).view(-1, self._routers.layers, self._experts)
        elif self._routers is not None:
            self._routers.given = None
        inputs = self._inputs(documents.of_rows(tokens), documents)
        if self.router_aux_loss_coef:
            inputs["output_router_logits"] = True
        positions = documents.of_rows(documents.positions)
        decoder = self.causal.get_decoder()
        return decoder(**inputs, position_ids=positions[None], use_cache=False, documents=documents), documents

    @property
    def has_experts(self) -> bool:
        return bool(self._experts)

    @property
    def _may_share(self) -> bool:
        """Whether documents with equal prefixes may share the prefix's states. Not with dropout or noise, which differ
        between documents, nor with a balancing loss, which counts every token."""
        random = self.training and (self._drops_out or self.neftune_noise_alpha > 0)
        return self._packs and not random and not self.router_aux_loss_coef

    def _inputs(self, tokens: Tensor, documents: Documents) -> dict[str, Any]:
        if not (self.training and self.neftune_noise_alpha):
            return {"input_ids": tokens[None]}
        embedded = self.causal.get_input_embeddings()(tokens)
        return {"inputs_embeds": (embedded + self._noise(embedded, documents))[None]}

    def _noise(self, embedded: Tensor, documents: Documents) -> Tensor:
        """Uniform in +-alpha / sqrt(L * H), L the document's length. Source: arXiv:2310.05914, algorithm 1."""
        lengths = documents.boundaries.diff()
        scale = self.neftune_noise_alpha / (lengths * embedded.shape[-1]).float().sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return noise * scale.repeat_interleave(lengths)[:, None].to(noise.dtype)

    def _balancing_loss(self, router_logits: Any) -> Tensor:
        """The model's own formula, from the module that defines it."""
        formula = getattr(inspect.getmodule(type(self.causal)), "load_balancing_loss_func", None)
        if formula is None:
            raise ModelError(
                f"{type(self.causal).__name__} defines no load_balancing_loss_func; set model.router_aux_loss_coef=0"
            )
        config = self.causal.config
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        return formula(tuple(router_logits), experts, config.num_experts_per_tok)


def check_architecture(config: Any, path: str) -> None:
    """Raises ModelError for a model with layers that pass information between tokens by anything but an attention that
    can be packed (a recurrent state, a convolution): packed documents would see one another. `config` is that of the
    model at `path`."""
    text = config.get_text_config()
    layers = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    kinds = layers - PACKABLE
    # Where the configuration says what each layer is, the class, which takes a second to import, says no more.
    if kinds or (not layers and getattr(_class_of(config), "_is_stateful", False)):
        what = ", ".join(sorted(kinds)) or "a state that goes from token to token"
        raise ModelError(
            f"{path} has layers of a kind that cannot be trained on packed documents: {what} (known: "
            f"{', '.join(sorted(PACKABLE))}); use a model of another architecture"
        )


def _class_of(config: Any) -> Any:
    """The class of a model with that configuration; None: it has code of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def load_model(spec: ModelSpec, device: torch.device | str = "cpu", *, trainable: bool) -> LanguageModel:
    """The model with its adapters, on `device`, in training mode if `trainable`, else frozen. Raises ModelError."""
    register()
    causal = load_pretrained(
        spec.path,
        spec.trust_remote_code,
        head=spec.head,
        may_draw=trainable,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=spec.attn_implementation or VARLEN,
    )
    device = torch.device(device)
    model = prepare(causal, spec, trainable=trainable).to(device)
    model.kernels = fused_kernels.use(causal, device, spec.fused_kernels)
    if isinstance(model.head, VocabularyHead):
        model.head.fused = "head" in model.kernels
    return model


def prepare(causal: Any, spec: ModelSpec, *, trainable: bool) -> LanguageModel:
    """The part of `load_model` after the weights are loaded: adapters, trainable parameters, checkpointing."""
    causal.requires_grad_(trainable and spec.lora is None)
    if spec.lora is not None:
        attach(causal, spec.lora, spec.head)
    if spec.head is not Head.VOCABULARY and trainable:
        causal.score.requires_grad_(True)  # beside adapters, too, because it was usually drawn at random
        tokenizer = _tokenizer(spec)
        token = padding_token(tokenizer, causal.config)
        causal.config.get_text_config().pad_token_id = tokenizer.convert_tokens_to_ids(token)
    if spec.gradient_checkpointing and trainable:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    model = LanguageModel(
        causal,
        neftune_noise_alpha=spec.neftune_noise_alpha,
        router_aux_loss_coef=spec.router_aux_loss_coef,
        lm_head_fp32=spec.lm_head_fp32,
        attention_dtype=spec.attention_dtype,
    )
    return model.train(trainable)


def tokenizer_of(spec: ModelSpec) -> Any:
    """The model's tokenizer, as it is saved beside the model. Raises ModelError."""
    tokenizer = _tokenizer(spec)
    if spec.head is not Head.VOCABULARY:
        tokenizer.pad_token = padding_token(tokenizer, load_config(spec.path, spec.trust_remote_code))
    return tokenizer


def _tokenizer(spec: ModelSpec) -> Any:
    return load_tokenizer(spec.tokenizer or spec.path, spec.trust_remote_code, spec.chat_template)
