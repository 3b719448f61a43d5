"""The optimizers: torch's own, put together for a language model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundup.errors import ConfigError
from groundup.optim.groups import block_matrices, decay_groups


@dataclass(frozen=True)
class Optimizers:
    """What updates a model: one optimizer, or several that share its parameters between them."""

    parts: tuple[torch.optim.Optimizer, ...]

    def set_learning_rate(self, learning_rate: float) -> None:
        """The learning rate of the next step, for every parameter."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """What is kept between the updates of a parameter, by torch's names; nothing before the first."""
        return next((part.state[parameter] for part in self.parts if parameter in part.state), {})


class SGDW(torch.optim.SGD):
    """
    SGD with momentum and decoupled weight decay (Loshchilov and Hutter 2019, algorithm 1).

    First w ← (1 − αλ) w, then SGD's own step: b ← μ b + g and w ← w − α b. Decay is no part of the momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float):
        # Under weight_decay, SGD itself would add it to the gradient.
        own = [{**group, "weight_decay": 0.0, "shrink_by": group["weight_decay"]} for group in groups]
        super().__init__(own, lr=lr, momentum=momentum, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Decay, then update."""
        for group in self.param_groups:
            if decay := group["lr"] * group["shrink_by"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - decay)
        return super().step(closure)


def build_optimizer(
    model: nn.Module,
    *,
    optim: str,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    weight_decay_type: str,
    sgd_momentum: float,
    muon_momentum: float,
) -> Optimizers:
    """
    The optimizer of a model's trained parameters, by Hugging Face's names.

    With the gradient g, the learning rate α, and the weight decay λ of matrices, which is 0 for biases and norms:

    =================  =============================================================================================
    adamw_torch_fused  AdamW (Loshchilov and Hutter 2019): w ← w − α (m̂ / (√v̂ + ε) + λw), in one kernel
    adamw_torch        the same, not fused
    sgd                with momentum μ (Sutskever et al. 2013): b ← μb + g, w ← w − α (b + λw)
    adafactor          Adafactor (Shazeer and Stern 2018): as Adam without momentum, and with v of a matrix kept as a
                       row and a column
    muon               Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of the
                       blocks: their momentum, with all singular values brought near 1; AdamW, fused, for the rest
    =================  =============================================================================================

    ``coupled`` weight decay is part of the gradient instead, g + λw. So adamw_* are Adam (Kingma and Ba 2015) with an L2
    penalty, and sgd is b ← μb + (g + λw), w ← w − αb, computed in this order; without momentum w ← w − α (g + λw). Of
    adafactor and muon there is no such form.

    Adafactor's α is the size of the update, as in Hugging Face's Trainer, not a fraction of each tensor's own size as in the
    paper's section 8, so that one learning rate suits every optimizer. Torch always multiplies by
    max(ε₂, RMS(w)): ε₂ is 1, and only a tensor whose root mean square is above 1 takes larger steps. At step t torch keeps
    α below 1/√t. β₂ = 1 − t^−0.8 and clipping to a root mean square of 1 are algorithm 6's. The paper's ε₁ = 1e-30 in v is
    1e-15 in torch, which puts it on √v; torch's default, 1.2e-7, would be more than the mean of v in a model of GPT-2's size.

    Muon's update is scaled by 0.2 √max(rows, columns), which makes it as large as AdamW's (Liu et al. 2025, section 2.2), so
    that it takes AdamW's learning rate and weight decay. Its momentum is Nesterov's.

    Args:
        optim: adamw_torch_fused, adamw_torch, sgd, adafactor or muon.
        weight_decay_type: decoupled or coupled.
        sgd_momentum: μ of sgd; 0 keeps no state.
        muon_momentum: μ of Muon; ``beta1``, ``beta2`` and ``epsilon`` are those of its AdamW.

    Raises:
        ConfigError: muon, and this torch has none.
    """
    coupled = weight_decay_type == "coupled"
    if optim == "muon":
        return _muon_and_adamw(
            model, learning_rate=learning_rate, betas=(beta1, beta2), epsilon=epsilon, weight_decay=weight_decay,
            momentum=muon_momentum,
        )  # fmt: skip
    groups = decay_groups(model.parameters(), weight_decay)
    if optim == "sgd" and coupled:
        return Optimizers((torch.optim.SGD(groups, lr=learning_rate, momentum=sgd_momentum, fused=True),))
    if optim == "sgd":
        return Optimizers((SGDW(groups, lr=learning_rate, momentum=sgd_momentum),))
    if optim == "adafactor":
        return Optimizers((torch.optim.Adafactor(groups, lr=learning_rate, beta2_decay=-0.8, eps=(1e-15, 1.0), d=1.0),))
    adam = torch.optim.Adam if coupled else torch.optim.AdamW
    fused = optim == "adamw_torch_fused"
    # fused=None, not False: False would also turn off torch's own choice between a loop and batched kernels.
    return Optimizers((adam(groups, lr=learning_rate, betas=(beta1, beta2), eps=epsilon, fused=fused or None),))


def _muon_and_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    momentum: float,
) -> Optimizers:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optim: muon needs torch 2.9 or newer, and this is {torch.__version__}; upgrade it, or use adamw_torch_fused"
        )
    blocks, rest = block_matrices(model)
    # A group, not a list: what is frozen may leave none, and torch refuses an empty list.
    muon = torch.optim.Muon(
        [{"params": blocks}], lr=learning_rate, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(decay_groups(rest, weight_decay), lr=learning_rate, betas=betas, eps=epsilon, fused=True)
    return Optimizers((muon, adamw))
