"""How a model is trained: batches, learning rate, optimizer, targets."""

from dataclasses import dataclass

from groundup.config.declaration import AUTO, option
from groundup.config.ramp import Ramp


# fmt: off  (an option is read as a paragraph, not as a column)
@dataclass(frozen=True)
class BatchOptions:
    """Batches: how many tokens a step sees."""

    total_batch_tokens: int | Ramp = option(
        2**19,
        "Global batch of one optimizer step, rounded down to whole windows; accumulation follows from it. 32768:524288@0.2 "
        "grows it evenly over the first 0.2 of the run (or, from 1 on, so many steps), as GPT-3 did.",
        unit="tokens",
        at_least=1,
        why="ours: the number that matters, whatever the device holds",
    )
    per_device_train_batch_size: int | str = option(
        8,
        "Windows in one forward and backward pass; auto tries on throw-away weights which size fits and is fastest. The global "
        "batch stays the same.",
        unit="windows",
        at_least=1,
        choices=(AUTO,),
        why="Hugging Face's auto_find_batch_size changes the global batch",
    )
    gradient_accumulation_steps: int = option(
        0,
        "Passes per step; 0 computes it from total_batch_tokens. When given, the global batch follows from it.",
        unit="micro-batches",
        at_least=0,
        why="computed, so that the global batch is what was asked for",
    )
    per_device_eval_batch_size: int | str = option(
        8,
        "Windows in one pass of an evaluation; auto as above.",
        unit="windows",
        at_least=1,
        choices=(AUTO,),
        why="auto is ours",
    )
    sequence_length: int | Ramp = option(
        0,
        "Cut the training windows into pieces of this length; 0 is whole. 64:256@0.3 grows it, through divisors of "
        "n_positions, over the first 0.3 of the run (or so many steps). Tokens per step stay the same.",
        unit="tokens",
        at_least=0,
        why="ours: short contexts first are cheaper, Li et al. 2022 (sequence length warmup)",
    )
    stride: int = option(
        0,
        "Distance between the starts of two windows; 0 is n_positions (no overlap), less overlaps them.",
        unit="tokens",
        at_least=0,
        why="ours: Hugging Face's scripts cut blocks without overlap",
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Schedule: the learning rate over the run."""

    learning_rate: float = option(
        6e-4,
        "Peak learning rate.",
        at_least=0,
        why="5e-5 is for fine-tuning; this is GPT-3's for 125M, Brown et al. 2020, table 2.1",
    )
    lr_scheduler_type: str = option(
        "cosine_with_min_lr",
        "Shape of the schedule after warmup; `groundup schedule` draws it.",
        choices=(
            "cosine_with_min_lr",
            "cosine",
            "linear",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "polynomial",
            "warmup_stable_decay",
        ),
        why="GPT-3 decays by a cosine to a tenth; Hugging Face's linear is for fine-tuning",
    )
    warmup_steps: float = option(
        0.05,
        "Linear warmup: steps, or below 1 a fraction of the run.",
        unit="steps",
        at_least=0,
        why="training from random weights without warmup is fragile",
    )
    min_lr_rate: float = option(
        0.1,
        "Floor of cosine_with_min_lr, polynomial and warmup_stable_decay, as a fraction of learning_rate.",
        at_least=0,
        at_most=1,
        why="ours as an option: Hugging Face hides it in lr_scheduler_kwargs",
    )
    lr_power: float = option(1.0, "Power of polynomial.", above=0, why="ours as an option, as min_lr_rate")
    num_decay_steps: float = option(
        0.2,
        "Last part of warmup_stable_decay, in which the rate falls: steps, or below 1 a fraction of the run.",
        unit="steps",
        at_least=0,
        why="ours as an option, as min_lr_rate; a fifth is Hägele et al. 2024",
    )
    lr_decay_type: str = option(
        "cosine",
        "How warmup_stable_decay falls.",
        choices=("linear", "cosine", "1-sqrt"),
        why="ours as an option, as min_lr_rate",
    )
    inverse_sqrt_scale: float = option(
        0.0,
        "C of inverse_sqrt, α(s) = C·min(1/√s, s/w^1.5) at step s with w warmup steps; 0 takes the C that peaks at "
        "learning_rate.",
        at_least=0,
        why="ours: the formula's own constant, Vaswani et al. 2017, section 5.3",
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer: what makes an update of a gradient."""

    optim: str = option(
        "adamw_torch_fused",
        "AdamW (fused, or plain adamw_torch), sgd with momentum, adafactor, or muon for the matrices of the blocks with "
        "AdamW for the rest. sgd wants a learning rate of about 0.1.",
        choices=("adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "muon"),
        why="muon is ours: Hugging Face has none",
    )
    weight_decay: float = option(
        0.1,
        "Weight decay, on matrices only.",
        at_least=0,
        why="GPT-3, appendix B; Hugging Face's 0 is for fine-tuning",
    )
    weight_decay_type: str = option(
        "decoupled",
        "decoupled shrinks the weights beside the update; coupled adds λw to the gradient (L2), which Adam then rescales.",
        choices=("decoupled", "coupled"),
        why="ours: the comparison of Loshchilov and Hutter 2019",
    )
    adam_beta1: float = option(0.9, "AdamW's beta1.", at_least=0, below=1)
    adam_beta2: float = option(0.95, "AdamW's beta2.", at_least=0, below=1, why="GPT-3, appendix B")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0)
    sgd_momentum: float = option(0.9, "Momentum of sgd.", at_least=0, below=1, why="ours: Hugging Face passes optim_args")
    muon_momentum: float = option(0.95, "Momentum of muon.", at_least=0, below=1, why="ours, as sgd_momentum")
    max_grad_norm: float = option(1.0, "Clip the gradient to this global norm; 0 is off.", at_least=0)
    ema_decay: float = option(
        0.0,
        "Keep a moving average of the weights with this decay, e.g. 0.999; 0 is off. It is evaluated beside them, and "
        "--weights ema uses it.",
        at_least=0,
        below=1,
        why="ours: Hugging Face's Trainer has none",
    )


@dataclass(frozen=True)
class TargetOptions:
    """Targets: what the model is asked to predict."""

    label_smoothing_factor: float = option(
        0.0, "Spread this share of each target evenly over the vocabulary; 0 is off.", at_least=0, below=1
    )
    teacher: str = option(
        "",
        "Learn from the predictions of this model too (soft labels): a run, a checkpoint, or whatever `groundup import` reads, "
        "with the same tokenizer.",
        why="ours: distillation, Hinton et al. 2015",
    )
    teacher_temperature: float = option(2.0, "Soften both distributions by this temperature.", above=0, why="ours, as teacher")
    teacher_weight: float = option(
        0.5,
        "Share of the teacher's part in the loss; the rest is the text itself.",
        at_least=0,
        at_most=1,
        why="ours, as teacher",
    )
