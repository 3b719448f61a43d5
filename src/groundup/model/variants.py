"""
Variants of GPT-2: other norms, and norms at the other place. Their parts are put together here, by the configuration's names.

    norm           layer (GPT-2), rms, batch, none: every norm of the model, the last one too
    norm_position  pre (GPT-2), x + f(norm(x)) and a norm after the last block;
                   post (Vaswani et al. 2017; GPT-1), norm(x + f(x)) and no norm after the last block, whose own is the last

Without norms the two positions are the same model.
"""

from torch import Tensor

from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2, GPT2_PARTS, Block, GPT2Config, Norm, Parts, layer_norm
from groundup.model.kv_cache import KVCache
from groundup.model.norms import BATCH_NORM_CAVEATS, batch_norm, no_norm, rms_norm

NORMS: dict[str, Norm] = {"layer": layer_norm, "rms": rms_norm, "batch": batch_norm, "none": no_norm}
NORM_POSITIONS = ("pre", "post")


class PostNormBlock(Block):
    """A transformer block with a norm after each sum (Vaswani et al. 2017, section 3.1), under GPT-1's names."""

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.ln_1(x + self.attn(x, cache, layer))
        x = self.ln_2(x + self.mlp(x))
        return x  # noqa: RET504 - the two residual lines are the figure


def build_gpt2(config: GPT2Config) -> GPT2:
    """
    The model of a configuration, GPT-2 or a variant; its weights are not initialised.

    Raises:
        ConfigError: a norm or a position that there is not.
    """
    for name, value, known in (
        ("norm", config.norm, tuple(NORMS)),
        ("norm_position", config.norm_position, NORM_POSITIONS),
    ):
        if value not in known:
            raise ConfigError(f"{name}: {value!r} is none of {', '.join(known)}; choose one of them")
    if not config.is_variant:
        return GPT2(config, GPT2_PARTS)
    norm = NORMS[config.norm]
    if config.norm_position == "post":
        return GPT2(config, Parts(PostNormBlock, norm, no_norm))
    return GPT2(config, Parts(Block, norm, norm))


def caveats(config: GPT2Config) -> tuple[str, ...]:
    """What whoever trains such a model should be told, a line each; nothing for a GPT-2."""
    return BATCH_NORM_CAVEATS if config.norm == "batch" else ()
