"""Normalisation layers beside GPT-2's, each (B, T, C) to (B, T, C)."""

from torch import Tensor, nn

from groundup.model.gpt2 import GPT2Config

BATCH_NORM_CAVEATS = (
    "norm batch: in training a position is normalised with the positions after it, so the model sees a little of what it "
    "predicts: trust eval_loss, which uses running averages, not loss",
    "norm batch: its statistics are those of one pass, so gradient accumulation is not exact: "
    "per_device_train_batch_size changes the result",
)
"""What whoever chooses batch norm is told, a line each."""


def rms_norm(config: GPT2Config) -> nn.Module:
    """Root mean square normalisation (Zhang and Sennrich 2019): x / √(mean(x²) + ε) · weight; no mean, no shift."""
    return nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)


class BatchNorm(nn.BatchNorm1d):
    """
    Batch normalisation (Ioffe and Szegedy 2015) of each of the C features, over all B · T positions of a pass.

    A language model has reasons not to want it, which is what there is to see. In training, a position is normalised with
    statistics that later positions go into: the past knows a little of the future. And the statistics are those of one
    pass, so that a batch cut into passes does not give the gradients of the whole batch: accumulation is not exact.

    In evaluation the statistics are the running averages of training, x ← 0.9 x + 0.1 new at each pass, which is causal;
    they are buffers, part of the state dict. A pass in training mode needs two positions at least (torch's ValueError).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return super().forward(x.flatten(0, 1)).view(x.shape)


def batch_norm(config: GPT2Config) -> nn.Module:
    """Batch normalisation over batch and time, see ``BatchNorm``."""
    return BatchNorm(config.n_embd, eps=config.layer_norm_epsilon)


def no_norm(config: GPT2Config) -> nn.Module:
    """No normalisation: what comes in goes out."""
    return nn.Identity()
