"""How a model is, layer by layer: norms, size of the updates, activations, attention logits, dead units."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Health = dict[str, dict[str, float | None]]

MEASUREMENTS = ("grad_norm", "weight_norm", "update_ratio", "activation_rms", "attention_logit_max", "dead_units")
WINDOWS = 4
"""Windows that the extra forward pass looks at, at most."""
LOOKED_AT_TOKENS = 4096
"""Tokens that it looks at, at most, but for one window that is longer."""
DEAD_AT_MOST = 0.0
"""
A unit of the MLP whose output of c_fc is never above this is dead. GELU, ReLU and SiLU are above 0 just where their input is,
so such a unit does not fire at any token that was looked at. A rare unit may look dead in few tokens: watch the trend.
"""
BLOCK_LOGITS = 2**24
"""Attention logits formed at once: 64 MiB in float32."""


class HealthProbe:
    """
    Measurements of one optimizer step. In order: ``gradients`` and ``activations``, the update, ``updates``, ``measured``.

    None of them changes what is computed: weights, gradients, buffers and random numbers stay as they are. The numbers stay
    on the device until ``measured`` fetches them at once.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: a GPT-2 or its kin, not its compiled form: ``h`` holds the blocks, and a block has ``attn.c_attn`` (queries,
                keys and values of ``attn.n_head`` heads, in this order) and ``mlp.c_fc``.
        """
        self._model = model
        self._blocks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self._blocks.setdefault(_block_of(name), []).append(parameter)
        self._before: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        self._found: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def gradients(self) -> None:
        """
        Norms of gradients and weights; and copies of the weights, for ``updates``.

        Between the backward pass and the update, before clipping, with gradients that no scaler has multiplied. Frozen
        parameters count in the weight norm only.
        """
        for block, parameters in self._blocks.items():
            self._put("weight_norm", block, _norm(parameters))
            trained = [p for p in parameters if p.grad is not None]
            if trained:
                self._put("grad_norm", block, _norm(p.grad for p in trained if p.grad is not None))
                self._before[block] = [(p, p.detach().clone()) for p in trained]

    @torch.no_grad()
    def updates(self) -> None:
        """
        ‖Δw‖ / ‖w‖ of the update that was made since ``gradients``; nothing where that was not called.

        About 1e-3 is usual (Stanford CS231n, https://cs231n.github.io/neural-networks-3/, "Ratio of weights:updates").
        """
        for block, pairs in self._before.items():
            change = [before for _, before in pairs]
            torch._foreach_sub_(change, [after for after, _ in pairs])
            self._put("update_ratio", block, _norm(change) / self._found["weight_norm"][block])
        self._before = {}

    @torch.no_grad()
    def activations(self, input_ids: Tensor, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        """
        Look inside one more forward pass, in evaluation mode, over some windows of the step.

        Per block: the root mean square of its output, that is of the residual stream; the largest attention logit
        q·k / √D over heads and visible positions, which grows before attention collapses onto one token (Dehghani et al.
        2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2); the share of dead units.

        Args:
            input_ids: (B, T); the first few windows are taken.
            autocast: the precision of the forward passes.
        """
        rows = max(1, min(WINDOWS, LOOKED_AT_TOKENS // input_ids.size(1)))
        hooks = []
        try:
            for layer, block in enumerate(self._model.get_submodule("h").children()):
                name = f"h.{layer}"
                attention, c_fc = block.get_submodule("attn"), block.get_submodule("mlp.c_fc")
                see_logits = partial(self._see_logits, name, int(attention.n_head))  # type: ignore[arg-type]
                hooks.append(block.register_forward_hook(partial(self._see_output, name)))
                hooks.append(attention.get_submodule("c_attn").register_forward_hook(see_logits))
                hooks.append(c_fc.register_forward_hook(partial(self._see_units, name)))
            with evaluating(self._model), autocast():
                self._model(input_ids[:rows])
        finally:
            for hook in hooks:
                hook.remove()

    def measured(self) -> Health:
        """
        The measurements since the last call, by name and block, as JSON values: a number that is not finite is None.

        Names are ``MEASUREMENTS``, blocks wte, wpe, h.0 …, ln_f and lm_head, as far as the model has them; the three that
        ``activations`` measures have h.0 … only.
        """
        keys = [(name, block) for name in MEASUREMENTS for block in self._found.get(name, {})]
        values = torch.stack([self._found[name][block].float() for name, block in keys]).tolist() if keys else []
        health: Health = {}
        for (name, block), value in zip(keys, values, strict=True):
            health.setdefault(name, {})[block] = value if math.isfinite(value) else None
        self._found, self._before = {}, {}
        return health

    def _put(self, name: str, block: str, value: Tensor) -> None:
        self._found.setdefault(name, {})[block] = value

    def _see_output(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._put("activation_rms", name, torch.linalg.vector_norm(output, dtype=torch.float32) / math.sqrt(output.numel()))

    def _see_units(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._put("dead_units", name, (output.flatten(0, -2).amax(0) <= DEAD_AT_MOST).float().mean())

    def _see_logits(self, name: str, heads: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._put("attention_logit_max", name, largest_attention_logit(output, heads))


def largest_attention_logit(projected: Tensor, heads: int) -> Tensor:
    """
    The largest q·k / √D over windows, heads, and pairs of a position and one that it sees: itself and those before.

    Args:
        projected: c_attn's output (B, T, 3C): queries, keys, values.
        heads: into which C is cut, H.
    """
    B, T, width = projected.shape
    D = width // 3 // heads
    with torch.autocast(projected.device.type, enabled=False):
        q, k = projected.float().view(B, T, 3, heads, D)[:, :, :2].permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        rows = max(1, BLOCK_LOGITS // (heads * T))
        largest = []
        for window in range(B):
            for start in range(0, T, rows):
                end = min(start + rows, T)
                logits = q[window, :, start:end] @ k[window, :, :end].transpose(1, 2)  # (H, rows, end)
                unseen = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu_(start + 1)
                largest.append(logits.masked_fill_(unseen, -torch.inf).amax())
        return torch.stack(largest).amax() / math.sqrt(D)


def _block_of(parameter: str) -> str:
    """Which block a parameter counts to: h.3.mlp.c_fc.weight to h.3, wte.weight to wte."""
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] == "h" else parts[0]


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all elements of some tensors together."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return norm


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block; then each module as it was, also where parts had another mode than the whole."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
