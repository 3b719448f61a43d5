"""A model made ready to generate: its weights in the precision asked for, its products by the fastest way for few rows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.model.gpt2 import GPT2

FEW = 8
"""Rows up to which a bf16 product is faster the other way round; measured in docs/log.md."""


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    ``F.linear`` for the few rows (N, in) of a generation step, (N, out): the same products, read in a faster order.

    Such a product only reads the matrix once. On processors torch reads it faster for a vector than for a matrix of one row
    (up to 1.9 times in bf16), and in bf16 up to FEW rows faster as W xᵀ than as x Wᵀ (up to 1.4 times).
    """
    if x.device.type == "cpu" and x.size(0) == 1:
        row = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return row[None]
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.size(0) <= FEW:
        columns = torch.mm(weight, x.T)  # (out, N)
        return (columns if bias is None else columns.add_(bias[:, None])).T.contiguous()
    return F.linear(x, weight, bias)


class FewRowsLinear(nn.Linear):
    """A linear layer that takes ``few_rows_linear``'s way."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        rows = x.reshape(-1, x.size(-1))
        return few_rows_linear(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


def for_inference(model: GPT2, device: torch.device, dtype: torch.dtype) -> GPT2:
    """The same model in evaluation mode on a device, its weights in ``dtype``, without gradients; changed in place."""
    model = model.to(device, dtype).eval().requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRowsLinear  # the same parameters, another forward
    return model
