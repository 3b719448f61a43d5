"""What is trained: shape, parts and initial weights."""

from dataclasses import dataclass

from groundup.config.declaration import option


# fmt: off  (an option is read as a paragraph, not as a column)
@dataclass(frozen=True)
class ModelOptions:
    """Model: the shape of the GPT-2."""

    model: str = option(
        "gpt2-micro",
        "Preset that sets the shape, the global batch and the learning rate, each of which can be overridden: gpt2, "
        "gpt2-medium, gpt2-large, gpt2-xl; for laptops gpt2-mini, gpt2-micro, gpt2-nano.",
        why="ours: a name for a set of defaults",
    )
    n_layer: int = option(12, "Transformer blocks.", at_least=1)
    n_head: int = option(12, "Attention heads; they divide n_embd.", at_least=1)
    n_embd: int = option(768, "Width of the embeddings and of the residual stream.", at_least=1)
    n_inner: int = option(0, "Width inside the MLP; 0 is 4 × n_embd.", at_least=0, why="GPT2Config spells 'four times' as None")
    n_positions: int = option(1024, "Context length.", unit="tokens", at_least=1)
    resid_pdrop: float = option(
        0.0,
        "Dropout on the residual branches.",
        at_least=0,
        below=1,
        why="pre-training sees most tokens once, where dropout only costs; GPT-2 had 0.1",
    )
    embd_pdrop: float = option(0.0, "Dropout on the embeddings.", at_least=0, below=1, why="as resid_pdrop")
    attn_pdrop: float = option(0.0, "Dropout on the attention weights.", at_least=0, below=1, why="as resid_pdrop")
    activation_function: str = option(
        "gelu_new", "GELU in the MLP: gelu_new, its tanh form, as GPT-2; or gelu, exact.", choices=("gelu_new", "gelu")
    )
    norm: str = option(
        "layer",
        "Normalisation in the blocks: layer, as GPT-2; rms; batch (over batch and time: it lets a position see later ones, and "
        "depends on how a batch is cut); or none. Only layer is a GPT-2 for other programs.",
        choices=("layer", "rms", "batch", "none"),
        why="ours: to compare",
    )
    norm_position: str = option(
        "pre",
        "Normalise before each part of a block (pre), as GPT-2, or after its sum (post), as GPT-1. Only pre is a GPT-2.",
        choices=("pre", "post"),
        why="ours: to compare",
    )
    layer_norm_epsilon: float = option(1e-5, "Epsilon in the norms.", above=0)
    initializer_range: float = option(0.02, "Standard deviation of the initial weights.", at_least=0)
    tie_word_embeddings: bool = option(True, "Use the token embedding as the head, as GPT-2 does.")


@dataclass(frozen=True)
class InitialWeightsOptions:
    """Initial weights: somebody's, or random ones."""

    init: str = option(
        "gpt2",
        "How the matrices are drawn: gpt2 (normal, residual projections smaller), xavier_uniform, xavier_normal, he_uniform, "
        "he_normal, orthogonal, or small (gpt2 with the residual projections at zero).",
        choices=("gpt2", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "orthogonal", "small"),
        why="ours: to compare",
    )
    init_from: str = option(
        "",
        "Start from these weights instead of random ones: a run, a checkpoint, or whatever `groundup import` reads. Shape and "
        "tokenizer are theirs; n_positions may be another: positions are cut off, or added as copies of the first.",
        why="ours: the word is nanoGPT's",
    )
    freeze: tuple[str, ...] = option(
        (),
        "Leave parameters with such names as they are, e.g. 'wte*' or 'h.[0-5].*' (repeatable).",
        why="ours: Hugging Face leaves it to a loop in Python",
    )
