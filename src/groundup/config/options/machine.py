"""Where it is computed, and how."""

from dataclasses import dataclass

from groundup.config.declaration import AUTO, option


# fmt: off  (an option is read as a paragraph, not as a column)
@dataclass(frozen=True)
class MachineOptions:
    """Machine: where and in what precision to compute."""

    device: str = option(
        AUTO,
        "cuda, mps or cpu; auto takes the first that is there.",
        choices=(AUTO, "cuda", "mps", "cpu"),
        why="ours: Hugging Face has use_cpu",
    )
    bf16: bool | None = option(
        None,
        "bfloat16: in training by autocast, by default where the hardware multiplies it faster; in generation as the type of "
        "the weights, by default not.",
        why="False leaves half of the speed unused",
    )


@dataclass(frozen=True)
class SpeedOptions:
    """Speed: how the training step is run, and measured."""

    fp16: bool = option(
        False, "float16 in training by autocast, instead of bf16, with a loss scale that is part of the checkpoint."
    )
    tf32: bool = option(
        False, "TF32 for float32 products on CUDA, instead of bf16.", why="Hugging Face leaves torch's own default"
    )
    activation_checkpointing: bool = option(
        False,
        "Compute activations a second time in the backward pass instead of keeping them: less memory, a third more time.",
        why="Hugging Face spells 'off' as None; gradient_checkpointing is its older name",
    )
    torch_compile: bool = option(False, "Compile the model with torch.compile.")
    peak_tflops: float = option(
        0.0,
        "Peak of the device for MFU; 0 is the data sheet's or, where unknown, measured.",
        unit="TFLOP/s",
        at_least=0,
        why="ours: MFU needs it",
    )
