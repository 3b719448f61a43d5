"""Set-ups with one fault planted in each, and sound ones of many shapes, for the tests of diagnostics."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.diagnostics.subject import Subject, gpt2_subject
from groundup.model.gpt2 import GPT2, Attention, Block, GPT2Config, Parts, layer_norm
from groundup.model.initial import initialize
from groundup.model.loss import next_token_loss
from groundup.model.variants import build_gpt2
from groundup.optim.optimizers import build_optimizer

SHAPE: dict[str, Any] = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


def tokens(vocab_size: int, windows: int, length: int, seed: int) -> Tensor:
    """Text-like ids (windows, length): a few words of some tokens, again and again, frequent ones more often."""
    draw = random.Random(seed)
    words = [[draw.randrange(vocab_size) for _ in range(draw.randint(1, 5))] for _ in range(60)]
    stream: list[int] = []
    while len(stream) < windows * length:
        stream += words[min(int(draw.expovariate(0.08)), 59)]
    return torch.tensor(stream[: windows * length]).view(windows, length)


def optimizer(model: nn.Module, learning_rate: float) -> Any:
    return build_optimizer(
        model, optim="adamw_torch", learning_rate=learning_rate, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1,
        weight_decay_type="decoupled", sgd_momentum=0.9, muon_momentum=0.95,
    )  # fmt: skip


def new_model(seed: int, init: str = "gpt2", parts: Parts | None = None, **shape: Any) -> GPT2:
    config = GPT2Config(**{**SHAPE, **shape})
    model = build_gpt2(config) if parts is None else GPT2(config, parts)
    initialize(model, torch.Generator().manual_seed(seed), init)
    return model


def sound(
    seed: int = 0,
    learning_rate: float = 1e-3,
    init: str = "gpt2",
    parts: Parts | None = None,
    real_vocab: int = 0,
    **shape: Any,
) -> Subject:
    """What groundup does: its model, its loss, its optimizer."""
    model = new_model(seed, init, parts, **shape)
    real = real_vocab or model.config.vocab_size
    text = tokens(real, 4, min(64, model.config.n_positions) + 1, seed)
    made = gpt2_subject(
        model, text[:, :-1], text[:, 1:], make_optimizer=optimizer, learning_rate=learning_rate, max_grad_norm=1.0,
        warmup_steps=100, seed=seed, vocab_size=real,
    )  # fmt: skip
    if real < model.config.vocab_size:
        whole = made.loss_fn
        made = replace(made, loss_fn=lambda scores, labels: whole(scores[..., :real], labels))
    return made


class LeakyAttention(Attention):
    """The mask is off by one: each position sees the next one."""

    def forward(self, x: Tensor, cache: Any = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        mask = torch.ones(T, T, dtype=torch.bool).tril(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class DetachedBlock(Block):
    """The residual stream is cut for the backward pass."""

    def forward(self, x: Tensor, cache: Any = None, layer: int = 0) -> Tensor:
        x = x.detach() + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class DetachedMLPBlock(Block):
    """The same at the second sum."""

    def forward(self, x: Tensor, cache: Any = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x.detach() + self.mlp(self.ln_2(x))


def causal_leak(**how: Any) -> Subject:
    made = sound(**how)
    for block in made.model.h:
        block.attn.__class__ = LeakyAttention
    return made


def target_not_shifted(**how: Any) -> Subject:
    made = sound(**how)
    return replace(made, labels=made.inputs.clone())


def target_shifted_twice(**how: Any) -> Subject:
    made = sound(**how)
    text = tokens(made.vocab_size, made.inputs.size(0), made.inputs.size(1) + 2, how.get("seed", 0))
    return replace(made, inputs=text[:, :-2], labels=text[:, 2:])


def loss_summed(**how: Any) -> Subject:
    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        rows = scores.flatten(0, 1)
        return next_token_loss(torch.eye(rows.size(0), dtype=rows.dtype), rows.T, labels)

    return replace(sound(**how), loss_fn=loss)


def loss_over_padded_vocabulary(**how: Any) -> Subject:
    vocab_size = how.pop("vocab_size", SHAPE["vocab_size"])
    made = sound(**how, vocab_size=-(-(vocab_size + 1) // 64) * 64, real_vocab=vocab_size)
    return replace(made, loss_fn=gpt2_subject(made.model, made.inputs, made.labels).loss_fn)


def residual_detached(block: type[Block] = DetachedBlock, **how: Any) -> Subject:
    return sound(parts=Parts(block, layer_norm, layer_norm), **how)


def loss_sign_wrong(**how: Any) -> Subject:
    made = sound(**how)
    return replace(made, loss_fn=lambda scores, labels: -made.loss_fn(scores, labels))


def parameters_frozen(**how: Any) -> Subject:
    made = sound(**how)
    made.model.h[len(made.model.h) // 2].requires_grad_(False)
    return made


def learning_rate_too_large(**how: Any) -> Subject:
    made = sound(**how)
    return replace(made, learning_rate=made.learning_rate * 1000)


def learning_rate_too_small(**how: Any) -> Subject:
    made = sound(**how)
    return replace(made, learning_rate=made.learning_rate / 1e6)


@torch.no_grad()
def initial_weights_zero(**how: Any) -> Subject:
    made = sound(**how)
    for parameter in made.model.parameters():
        parameter.zero_()
    return made


@torch.no_grad()
def initial_weights_too_large(**how: Any) -> Subject:
    made = sound(**how)
    for parameter in made.model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(30)
    return made


def model_too_simple(**how: Any) -> Subject:
    return sound(**{**how, "n_layer": 1, "n_embd": 2, "n_head": 1})


def labels_unrelated(**how: Any) -> Subject:
    made = sound(**how)
    order = torch.randperm(made.labels.numel(), generator=torch.Generator().manual_seed(how.get("seed", 0)))
    return replace(made, labels=made.labels.flatten()[order].view_as(made.labels))


FAULTS: dict[str, Callable[..., Subject]] = {
    plant.__name__: plant
    for plant in (
        causal_leak, target_not_shifted, target_shifted_twice, loss_summed, loss_over_padded_vocabulary, residual_detached,
        loss_sign_wrong, parameters_frozen, learning_rate_too_large, learning_rate_too_small, initial_weights_zero,
        initial_weights_too_large, model_too_simple, labels_unrelated,
    )
}  # fmt: skip

HEALTHY: dict[str, dict[str, Any]] = {
    "usual": {},
    "untied": {"tie_word_embeddings": False, "learning_rate": 3e-4},
    "one layer": {"n_layer": 1, "n_embd": 64, "learning_rate": 3e-3},
    "eight layers": {"n_layer": 8, "learning_rate": 3e-3},
    "wide": {"n_embd": 256, "n_head": 8, "n_positions": 64, "learning_rate": 3e-4},
    "padded vocabulary": {"vocab_size": 50304, "real_vocab": 50257, "n_positions": 16, "n_layer": 1},
    "small init, dropout": {"init": "small", "resid_pdrop": 0.2, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "vocab_size": 64},
    "xavier, exact gelu": {"init": "xavier_uniform", "activation_function": "gelu", "n_layer": 4, "n_embd": 48},
    "rms norm": {"norm": "rms", "n_layer": 3, "n_embd": 128, "learning_rate": 3e-3, "tie_word_embeddings": False},
    "post norm": {"norm_position": "post", "n_layer": 4, "n_embd": 64, "learning_rate": 3e-4},
}
