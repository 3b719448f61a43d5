"""Model presets: the published GPT-2 shapes, and small ones for laptops, as plain values."""

# GPT-2's shapes: Radford et al. 2019, table 2 (its parameter counts are wrong; 124M, 355M, 774M and 1558M are right).
# Learning rates: GPT-3's for the nearest size, Brown et al. 2020, table 2.1. Small ones: measured in docs/log.md.
PRESETS: dict[str, dict[str, int | float]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024,
             "total_batch_tokens": 2**19, "learning_rate": 6e-4},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "n_positions": 1024,
                    "total_batch_tokens": 2**19, "learning_rate": 3e-4},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "n_positions": 1024,
                   "total_batch_tokens": 2**19, "learning_rate": 2.5e-4},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "n_positions": 1024,
                "total_batch_tokens": 2**19, "learning_rate": 2e-4},
    "gpt2-mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 256,
                  "total_batch_tokens": 2**14, "learning_rate": 1e-3},
    "gpt2-micro": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256,
                   "total_batch_tokens": 2**12, "learning_rate": 2e-3},
    "gpt2-nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128,
                  "total_batch_tokens": 2**11, "learning_rate": 3e-3},
}  # fmt: skip

# With --init-from, in place of a preset's: the shape is the model's. The rate is Hugging Face's default; the batch suits
# texts that are small beside what the model has seen.
FINE_TUNING: dict[str, int | float] = {"total_batch_tokens": 2**12, "learning_rate": 5e-5}

PRESET_OPTIONS = frozenset(name for values in PRESETS.values() for name in values)
"""Options whose default is the preset's."""
