"""
Initial weights: GPT-2's own, and the published alternatives for its matrices.

Only the matrices of the blocks and an untied head differ. Biases are 0 and norms 1, and embeddings are always GPT-2's:
they are looked up, one row at a time, so that no formula about the inputs of a matrix is about them; and the tied head is the
token embedding, whose small numbers make a new model guess evenly.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2, GPT2Config

Draw = Callable[[str, Tensor, GPT2Config, torch.Generator], object]
"""Fills a matrix (out, in), given its name."""


def initialize(model: GPT2, generator: torch.Generator, init: str = "gpt2") -> None:
    """
    Initial weights, in place; every draw comes from the generator, so the same seed gives the same embeddings for each init.

    ``gpt2``: normal with ``initializer_range``. The layers that write into the residual stream are scaled down by the root of
    their number (section 2.3), and positions start smaller than tokens (https://github.com/openai/gpt-2/blob/master/src/model.py,
    ``wpe``). The others are as in their papers, without that scaling; ``initializer_range`` is then the embeddings' alone.

    Args:
        model: on the CPU, so that weights are the same for every device; a variant's running statistics are set anew too.
        init: ``gpt2``, ``small``, ``xavier_uniform``, ``xavier_normal``, ``he_uniform``, ``he_normal`` or ``orthogonal``.

    Raises:
        ConfigError: an init that there is not.
    """
    if init not in INITS:
        raise ConfigError(f"init: {init!r} is none of {', '.join(INITS)}; choose one of them")
    config, draw = model.config, INITS[init]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name or name.startswith("ln_f"):
                parameter.fill_(1.0)
            elif name.startswith("wte"):
                parameter.normal_(0.0, config.initializer_range, generator=generator)
            elif name.startswith("wpe"):
                parameter.normal_(0.0, config.initializer_range / 2, generator=generator)
            else:
                draw(name, parameter, config, generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()


def _writes_to_residual(name: str) -> bool:
    return name.endswith("c_proj.weight")


def _gpt2(name: str, weight: Tensor, config: GPT2Config, generator: torch.Generator) -> None:
    std = config.initializer_range
    residual_std = std / math.sqrt(2 * config.n_layer)
    weight.normal_(0.0, residual_std if _writes_to_residual(name) else std, generator=generator)


def _small(name: str, weight: Tensor, config: GPT2Config, generator: torch.Generator) -> None:
    """
    GPT-2's, then the residual projections 0: each block starts as the identity (in post-norm, as its norms).

    Zhang et al. 2019 (Fixup), section 3: the last layer of each residual branch starts at 0. Drawn before it is zeroed, so
    that all other weights are those that ``gpt2`` draws.
    """
    _gpt2(name, weight, config, generator)
    if _writes_to_residual(name):
        weight.zero_()


def _xavier(fill: Callable[..., Tensor]) -> Draw:
    """
    Glorot and Bengio 2010, equations 12 and 16: variance 2 / (in + out).

    ``c_attn`` is one matrix of C in and 3 C out: the gradient of its input sums over all of them, query, key and value.
    """
    return lambda name, weight, config, generator: fill(weight, generator=generator)


def _he(fill: Callable[..., Tensor]) -> Draw:
    """
    He et al. 2015, equations 7 to 10: variance gain² / in, so that outputs are as large as inputs.

    The gain is √2 for the matrix that reads the MLP's GELU, ``mlp.c_proj``, because ReLU halves the second moment of what it
    lets through, and GELU nearly so (0.425 of it); it is 1 for all others, which read a norm's or attention's output.
    """

    def draw(name: str, weight: Tensor, config: GPT2Config, generator: torch.Generator) -> None:
        nonlinearity = "relu" if name.endswith("mlp.c_proj.weight") else "linear"
        fill(weight, mode="fan_in", nonlinearity=nonlinearity, generator=generator)

    return draw


def _orthogonal(name: str, weight: Tensor, config: GPT2Config, generator: torch.Generator) -> None:
    """
    Saxe et al. 2014, section 3: WᵀW = 1, or WWᵀ = 1 where there are fewer rows than columns.

    Query, key and value are three maps in one matrix: each is made orthogonal, or none of them would be.
    """
    for part in weight.chunk(3) if name.endswith("c_attn.weight") else (weight,):
        nn.init.orthogonal_(part, generator=generator)


INITS: dict[str, Draw] = {
    "gpt2": _gpt2,
    "small": _small,
    "xavier_uniform": _xavier(nn.init.xavier_uniform_),
    "xavier_normal": _xavier(nn.init.xavier_normal_),
    "he_uniform": _he(nn.init.kaiming_uniform_),
    "he_normal": _he(nn.init.kaiming_normal_),
    "orthogonal": _orthogonal,
}
