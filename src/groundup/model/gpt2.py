"""
GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), in PyTorch.

Dimensions, named once:
    B  windows in a batch        C  width of the residual stream (n_embd)
    T  tokens in a window        H  attention heads (n_head)
    V  vocabulary                D  width of a head, C / H

Modules have GPT-2's names (wte, wpe, h, ln_1, attn.c_attn, mlp.c_fc, ln_f), so that state dicts compare by eye.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.errors import ConfigError
from groundup.model.kv_cache import KVCache


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, under the names of Hugging Face's ``GPT2Config``."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 0
    """Width inside the MLP; 0 is 4 × n_embd."""
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    activation_function: str = "gelu_new"
    """GELU in the MLP: ``gelu_new``, its tanh form, which GPT-2 has; or ``gelu``, exact, which nanoGPT has."""
    norm: str = "layer"
    """Normalisation: ``layer``, which GPT-2 has; ``rms``, ``batch`` or ``none`` are variants, see ``model.variants``."""
    norm_position: str = "pre"
    """Before each part of a block, ``pre``, as in GPT-2; or after its sum, ``post``, as in GPT-1: a variant."""
    layer_norm_epsilon: float = 1e-5
    """Epsilon of the norms, whichever they are."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    """Whether the head is the token embedding, as in GPT-2; else it is a matrix of its own, ``lm_head``."""

    @property
    def is_variant(self) -> bool:
        """Whether this computes something else than a GPT-2, for which other programs would take it."""
        return (self.norm, self.norm_position) != ("layer", "pre")


Norm = Callable[[GPT2Config], nn.Module]
"""Makes a normalisation layer: (B, T, C) to (B, T, C)."""


def layer_norm(config: GPT2Config) -> nn.Module:
    """Layer normalisation (Ba et al. 2016): each vector to mean 0 and variance 1, then scaled and shifted."""
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, T, C) to (B, T, C); with a cache, the T tokens also attend to the cached ones before them."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, cached + T, D)
            mask = cache.mask
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and k.size(2) == T,
            dropout_p=self.attn_pdrop if self.training else 0.0,
        )  # (B, H, T, D)  # fmt: skip
        y = y.transpose(1, 2).reshape(B, T, C)
        dropped: Tensor = self.resid_dropout(self.c_proj(y))
        return dropped


class MLP(nn.Module):
    """Position-wise feed-forward network with GELU (Hendrycks and Gimpel 2016), in GPT-2 its tanh form."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)
        self.approximate = {"gelu_new": "tanh", "gelu": "none"}[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        dropped: Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))
        return dropped


class Block(nn.Module):
    """A transformer block with layer norm before each part (GPT-2, section 2.3)."""

    def __init__(self, config: GPT2Config, norm: Norm = layer_norm):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x  # noqa: RET504 - the two residual lines are the figure


@dataclass(frozen=True)
class Parts:
    """What a GPT-2 is put together from; a variant hands in others."""

    block: Callable[[GPT2Config, Norm], nn.Module] = Block
    norm: Norm = layer_norm
    """In the blocks, ln_1 and ln_2."""
    last_norm: Norm = layer_norm
    """After the last block, ln_f."""


GPT2_PARTS = Parts()


class GPT2(nn.Module):
    """
    Token and position embeddings, blocks, a last layer norm; the head is the token embedding unless it is untied.

    Raises:
        ConfigError: the configuration is of a variant, and no parts were given: ``model.variants.build_gpt2`` gives them.
    """

    def __init__(self, config: GPT2Config, parts: Parts = GPT2_PARTS):
        super().__init__()
        if parts is GPT2_PARTS and config.is_variant:
            raise ConfigError(
                f"norm: {config.norm}, {config.norm_position}-norm is a variant of GPT-2; build it with "
                "groundup.model.variants.build_gpt2"
            )
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(parts.block(config, parts.norm) for _ in range(config.n_layer))
        self.ln_f = parts.last_norm(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """
        Hidden states (B, T, C) of token ids (B, T); multiply by ``head_weight`` for logits.

        Args:
            input_ids: int64 ids below the vocabulary; with the cached tokens at most n_positions of them.
            cache: keys and values of the tokens before; extended by these.
        """
        T = input_ids.size(1)
        positions = torch.arange(T, device=input_ids.device) if cache is None else cache.begin(T)
        x = self.drop(self.wte(input_ids) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.advance(T)
        normed: Tensor = self.ln_f(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token (…, V) from hidden states (…, C)."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, C): the token embedding itself, where the two are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight
