"""Counts: parameters, and the arithmetic of a training step."""

from groundup.model.gpt2 import GPT2, GPT2Config


def parameter_count(model: GPT2) -> int:
    """Parameters, the tied embedding counted once: 124,439,808 for GPT-2 small."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops_per_token(config: GPT2Config) -> int:
    """
    FLOPs of forward and backward per token: 6 per weight in a product, and 12 · L · C · T for attention.

    Source: Chowdhery et al. 2022 (PaLM), appendix B. Embedding look-ups are not products; the head is one.
    """
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    block = 4 * width * width + 2 * width * inner
    products = config.n_layer * block + config.vocab_size * width
    return 6 * products + 12 * config.n_layer * width * config.n_positions
