"""A run: its length, what is kept of it, and what is told about it."""

from dataclasses import dataclass

from groundup.config.declaration import option


# fmt: off  (an option is read as a paragraph, not as a column)
@dataclass(frozen=True)
class RunOptions:
    """Run: how long, and when to log, evaluate and save."""

    max_steps: int = option(
        0,
        "Steps to train; 0 follows max_train_tokens, or else num_train_epochs.",
        unit="steps",
        at_least=0,
        why="Hugging Face spells 'off' as -1",
    )
    max_train_tokens: int = option(
        0,
        "Train until so many tokens were seen; 0 follows num_train_epochs.",
        unit="tokens",
        at_least=0,
        why="ours: what papers give",
    )
    num_train_epochs: float = option(
        3.0, "Passes over the training windows, where neither of these is given.", unit="epochs", above=0
    )
    logging_steps: int = option(10, "Log every so many steps.", unit="steps", at_least=1, why="500 shows a small run nothing")
    eval_steps: int = option(
        250,
        "Evaluate every so many steps, before the first and after the last; 0 is never.",
        unit="steps",
        at_least=0,
        why="a curve needs points from the start",
    )
    max_eval_tokens: int = option(
        2**20,
        "Validation tokens of one evaluation during training, spread evenly; 0 is all of them.",
        unit="tokens",
        at_least=0,
        why="ours: ten gigabytes of validation text would stop the run for hours",
    )
    save_steps: int = option(
        250,
        "Save a checkpoint every so many steps and after the last; 0 is only the last.",
        unit="steps",
        at_least=0,
        why="less work to lose",
    )
    save_total_limit: int = option(
        2,
        "Checkpoints to keep; 0 keeps all. With load_best_model_at_end the best one is kept, too.",
        at_least=0,
        why="a full disk ends more runs than a missing old checkpoint",
    )
    seed: int = option(42, "Seed of the weights, the data order and the dropout.", at_least=0)


@dataclass(frozen=True)
class SelectionOptions:
    """Selection: which checkpoint is the best, and when to stop looking for a better one."""

    load_best_model_at_end: bool = option(
        False, "End with the best checkpoint: commands that are given the run use it. Needs save_steps in step with eval_steps."
    )
    metric_for_best_model: str = option(
        "loss",
        "What is best: loss, perplexity, bits_per_byte, token_accuracy, or another figure of the evaluation (eval_ may be left "
        "out; NAME_loss is a source's, ema_loss the averaged weights').",
        why="Hugging Face's default, spelled out",
    )
    greater_is_better: bool | None = option(
        None, "Whether more of it is better; by itself more is better of everything but a loss, a perplexity and bits per byte."
    )
    early_stopping_patience: int = option(
        0,
        "Stop after so many evaluations in a row without a better one; 0 is off.",
        unit="evaluations",
        at_least=0,
        why="an argument of Hugging Face's EarlyStoppingCallback",
    )
    early_stopping_threshold: float = option(
        0.0, "How much better counts.", at_least=0, why="an argument of Hugging Face's EarlyStoppingCallback"
    )


@dataclass(frozen=True)
class SpikeOptions:
    """Spikes: what happens when the loss or the gradient jumps, or is no number."""

    max_skipped_steps: int = option(
        10,
        "Stop with exit code 5 after so many skipped steps in a row. A step whose loss or gradient is not finite is always "
        "skipped.",
        unit="steps",
        at_least=1,
        why="ours: a step that is not finite is skipped, and counted",
    )
    spike_threshold: float = option(
        8.0,
        "A loss or gradient norm so many deviations above the median of the last ones is a spike: its batch is saved as text; "
        "0 is off.",
        unit="deviations",
        at_least=0,
        why="ours",
    )
    spike_window: int = option(100, "Steps that a spike is compared with.", unit="steps", at_least=20, why="ours")
    spike_action: str = option(
        "report",
        "report tells of a spike and goes on; skip does not learn from its batch; rollback goes back to the last checkpoint "
        "and leaves that batch out.",
        choices=("report", "skip", "rollback"),
        why="ours: rolling back is PaLM's remedy, Chowdhery et al. 2022, section 5.1",
    )
    max_rollbacks: int = option(
        10, "Stop with exit code 5 instead of rolling back more often.", unit="rollbacks", at_least=1, why="ours"
    )


@dataclass(frozen=True)
class TrackingOptions:
    """Tracking: what is told about a run, and to whom."""

    report_to: tuple[str, ...] = option(
        (),
        "Send the numbers to tensorboard, wandb or trackio as well as to metrics.jsonl (repeatable).",
        choices=("none", "tensorboard", "wandb", "trackio"),
        why="Hugging Face's none is the empty list",
    )
    health_steps: int = option(
        0,
        "Measure every so many steps, layer by layer: gradient and weight norm, update ratio, activations, attention, dead "
        "units; 0 is never.",
        unit="steps",
        at_least=0,
        why="ours",
    )
    sample_prompt: str = option(
        "",
        "Prompt of the sample written at each evaluation; empty starts a new document.",
        why="ours: samples show what a loss cannot",
    )
    sample_tokens: int = option(64, "Length of that sample; 0 writes none.", unit="tokens", at_least=0, why="ours")
