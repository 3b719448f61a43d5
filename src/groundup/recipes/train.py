"""groundup train: text or a dataset to a model. What a run does, in order, is ``_train_once``."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from groundup.checkpoint.commit import checkpoints
from groundup.config.load import Settings
from groundup.config.options import (
    InitialWeightsOptions,
    ModelOptions,
    RunOptions,
    SelectionOptions,
    SpeedOptions,
    SpikeOptions,
    TrackingOptions,
)
from groundup.errors import DivergedError, Stopped
from groundup.evaluation.measure import Evaluation, byte_frequency_baseline
from groundup.model.flops import parameter_count, training_flops_per_token
from groundup.recipes.loading import best_checkpoint
from groundup.recipes.record import SAMPLES, add_left_out, add_start, own_left_out
from groundup.recipes.selection import best_saved, metric_of, out_of_patience
from groundup.recipes.spike_report import report_spike
from groundup.recipes.training import InHand, Training, open_training
from groundup.runtime.device import explained_memory_errors, peak_flops
from groundup.runtime.files import explained_os_errors
from groundup.runtime.signals import stop_requests
from groundup.tracking.metrics import METRICS, append_row, read_rows, rewind
from groundup.tracking.pictures import draw_curves
from groundup.tracking.progress import Progress, perplexity_text, step_line
from groundup.tracking.sinks import Sinks, open_sinks, require_installed
from groundup.training.loop import StepResult

Say = Callable[[str], None]
ShouldStop = Callable[[], bool]
BASELINE_TOKENS = 2**24
"""Tokens per split that the byte-frequency baseline counts at most."""


def train(sources: Sequence[str], run: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """
    Train a model into the directory ``run``; the same call again goes on where the run stopped.

    Returns:
        What ``train --json`` prints: steps, final_checkpoint, best_checkpoint, eval_loss, num_input_tokens_seen, seconds.

    Raises:
        ConfigError: as ``open_training``; a library that ``report_to`` needs is not installed.
        Stopped: a signal came; a checkpoint was saved.
        DivergedError: too many steps in a row were skipped, or the run went back too often.
    """
    # Before hours of preparing, and before the directory is made.
    require_installed(settings[TrackingOptions].report_to, settings.origins["report_to"])
    seconds, in_hand = 0.0, None
    with explained_os_errors(run, "train"), explained_memory_errors(), stop_requests(progress.say) as should_stop:
        while True:
            # A run that goes back is set up again, as one that was stopped there: there is one way to go on.
            with open_training(sources, run, settings, progress.say, in_hand) as training:
                finished, spent = _train_once(training, progress, should_stop, anew=in_hand is None)
                seconds += spent
                if finished:
                    return _summary(training, seconds)
                in_hand = InHand(training.corpus, training.teacher)
            del training  # or two models would be in memory


def _train_once(training: Training, progress: Progress, should_stop: ShouldStop, *, anew: bool) -> tuple[bool, float]:
    """
    Train to the end, or until the run goes back; returns whether it is the end, and the seconds of all steps.

    Args:
        anew: this process begins here; it has not gone back.
    """
    run, state, plan = training.run, training.state, training.plan
    options, selection = training.settings[RunOptions], training.settings[SelectionOptions]
    due = _evaluates_here(training) and not _evaluated(training)
    if not due and (limits := _ended_by(training)):
        training.prune()  # a run that was killed at its very end may not have come to it
        draw_curves(read_rows(run / METRICS), run, run.name)
        progress.say(f"run {run}: already complete at step {state.step:,}; raise {limits} to go on")
        return True, 0.0
    _describe(training, progress.say)
    if anew:
        add_start(run, state.step, training.machine.reason)
    peak, peak_origin = peak_flops(training.machine, training.settings[SpeedOptions].peak_tflops)
    progress.say(f"peak: {peak / 1e12:.2f} TFLOP/s ({peak_origin})")
    started_at, meter, ended = state.step, _Meter(), False
    with _sinks(training, progress.say) as sinks:
        if due:
            if not _evaluate(training, progress, sinks, should_stop):
                raise _stopped(state.step, training.save())
            ended = _stops_early(training, progress.say)
            training.prune()
        for step in () if ended else training:
            meter.add(step)
            stopping = should_stop()
            last = stopping or step.step == plan.total_steps
            if _went_back(training, step, progress.say):
                return False, meter.total_seconds
            if step.step == 1 or step.step % options.logging_steps == 0 or last or step.skipped or step.health or step.spike:
                row = _step_row(training, step, meter.tokens_per_second(), peak)
                _log(training, sinks, row)
                left = meter.total_seconds / (step.step - started_at) * (plan.total_steps - step.step)
                progress.step(step_line(row, plan.total_steps, left))
            # Saved before it is evaluated: an evaluation that is killed loses no training.
            checkpoint = None
            # Not while one step after the other is skipped: such a checkpoint would be as near to its end as this run.
            if last or (options.save_steps and step.step % options.save_steps == 0 and state.skipped_in_a_row < 2):
                checkpoint = training.save()
            if stopping and checkpoint:
                training.prune()
                raise _stopped(step.step, checkpoint)
            due = _evaluates_here(training)
            # An evaluation that a signal ended is made up for when the run goes on, from this very step.
            if due and not _evaluate(training, progress, sinks, should_stop):
                raise _stopped(step.step, checkpoint or training.save())
            ended = due and _stops_early(training, progress.say)
            if ended and not checkpoint:
                checkpoint = training.save()
            if checkpoint:
                training.prune()
            if ended:
                break
    if not state.updates and state.skipped_in_a_row:
        raise DivergedError(
            f"diverged: none of the {state.step} steps had a loss and gradient that are finite; nothing was learned: lower "
            "--learning-rate, or look at the data"
        )
    if selection.load_best_model_at_end:
        _say_best(training, progress.say)
    draw_curves(read_rows(run / METRICS), run, run.name)
    return True, meter.total_seconds


class _Meter:
    """Time and tokens of the steps since the last look, and in all."""

    def __init__(self) -> None:
        self.total_seconds = self._seconds = 0.0
        self._tokens = 0

    def add(self, step: StepResult) -> None:
        self.total_seconds += step.seconds
        self._seconds += step.seconds
        self._tokens += step.tokens

    def tokens_per_second(self) -> float:
        speed = self._tokens / self._seconds
        self._seconds, self._tokens = 0.0, 0
        return speed


def _stopped(step: int, checkpoint: Path) -> Stopped:
    return Stopped(f"stopped at step {step:,} by a signal; {checkpoint} is saved, the same command goes on")


def _evaluates_here(training: Training) -> bool:
    """Whether the step where the run is belongs to those that are evaluated."""
    every, step = training.settings[RunOptions].eval_steps, training.state.step
    return every > 0 and (step % every == 0 or step >= training.plan.total_steps)


def _ended_by(training: Training) -> str:
    """The options whose limits the run has reached; nothing where it goes on."""
    options, limits = training.settings[RunOptions], []
    if training.state.step >= training.plan.total_steps:
        limits.append("--max-train-tokens" if options.max_train_tokens else "--max-steps")
    if out_of_patience(read_rows(training.run / METRICS), training.settings[SelectionOptions]):
        limits.append("--early-stopping-patience")
    return " and ".join(limits)


def _stops_early(training: Training, say: Say) -> bool:
    """Whether the run ends here, because no evaluation was better for too long."""
    selection = training.settings[SelectionOptions]
    if not out_of_patience(read_rows(training.run / METRICS), selection):
        return False
    say(
        f"early stopping at step {training.state.step:,}: {metric_of(selection)} has not improved for "
        f"{selection.early_stopping_patience} evaluations"
    )
    return True


def _went_back(training: Training, step: StepResult, say: Say) -> bool:
    """Say what was unusual about a step; True where the run goes back to its last checkpoint and leaves the batch out."""
    options, run = training.settings[SpikeOptions], training.run
    if step.skipped and not step.spike:
        say(
            f"step {step.step}: SKIPPED: loss {step.loss}, gradient norm {step.grad_norm} are not finite; "
            f"nothing was updated ({training.state.skipped_steps} skipped so far)"
        )
    if not step.spike:
        return False
    what = {"report": "learned from", "skip": "not learned from", "rollback": "left out"}[options.spike_action]
    path = report_spike(run, training.model, training.course.samples, training.tokenizer, step, training.machine, action=what)
    say(f"step {step.step}: SPIKE: {step.spike.describe()}; the batch is {what}, and saved as text in {path}")
    if options.spike_action != "rollback":
        return False
    left_out = own_left_out(run, training.identity)
    if len(left_out) >= options.max_rollbacks:
        raise DivergedError(
            f"diverged: a spike at step {step.step} (loss {step.loss:.4g}, gradient norm {step.grad_norm:.4g}) after going "
            f"back {len(left_out)} times (max_rollbacks); the checkpoints are as they were; lower --learning-rate, or raise "
            "--max-rollbacks"
        )
    first, samples = step.positions
    add_left_out(
        run,
        training.identity,
        {"step": step.step, "first_sample": first, "samples": samples, "loss": step.loss, "grad_norm": step.grad_norm},
    )
    say(f"step {step.step}: going back to the last checkpoint, to go on without these {samples} windows")
    return True


def _describe(training: Training, say: Say) -> None:
    """The run in a few lines, before it starts."""
    plan, config = training.plan, training.model.config
    options, start = training.settings[ModelOptions], training.settings[InitialWeightsOptions].init_from
    say(f"device: {training.machine.reason}")
    say(
        f"model: {start or options.model}, {parameter_count(training.model):,} parameters ({config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} wide, context {config.n_positions}, vocabulary {config.vocab_size:,})"
    )
    passes, first, length = -(-plan.windows_per_step // plan.per_pass), plan.tokens_at(1), plan.sequence_length_at(1)
    say(
        f"batch: {plan.tokens_per_step:,} tokens = {plan.windows_per_step} windows of {config.n_positions}, in {passes} "
        f"pass{'es' if passes > 1 else ''} of at most {plan.per_pass}"
        + (f"; at first {first:,} tokens" if first != plan.tokens_per_step else "")
        + (f"; cut into {length} tokens at first" if length < config.n_positions else "")
    )
    say(
        f"length: {plan.total_steps:,} steps = {plan.total_windows * plan.n_positions:,} tokens = {plan.epochs:.2f} epochs "
        f"of {plan.windows:,} windows; warmup {plan.warmup_steps:,} steps"
    )
    if epochs := training.source_epochs():
        shares = training.corpus.weights
        say("sources: " + "; ".join(f"{name} {shares[name]:.1%}, {count:.2f} epochs" for name, count in epochs.items()))
    bits = byte_frequency_baseline(
        training.corpus.first_tokens("train", BASELINE_TOKENS),
        training.corpus.first_tokens("validation", BASELINE_TOKENS),
        training.corpus.tokenizer.token_bytes,
    )
    say(
        f"to beat on validation: {bits:.3f} bits per byte by byte frequencies alone; "
        f"loss {np.log(config.vocab_size):.3f} by guessing evenly"
    )


def _say_best(training: Training, say: Say) -> None:
    selection = training.settings[SelectionOptions]
    if best := best_saved(training.run, read_rows(training.run / METRICS), selection):
        averaged = ", with --weights ema" if metric_of(selection) == "eval_ema_loss" else ""
        say(
            f"best: checkpoint-{best.step} with {metric_of(selection)} {best.value:.4f}; commands that are given the run use it"
            f"{averaged}"
        )


def _evaluated(training: Training) -> bool:
    """Whether the evaluation of this step was logged before the run was interrupted."""
    rows = read_rows(training.run / METRICS)
    return any(row["step"] == training.state.step and "eval_loss" in row for row in rows)


def _evaluate(training: Training, progress: Progress, sinks: Sinks, should_stop: ShouldStop) -> bool:
    """Measure, log, sample and draw; False when a signal ended it."""
    result = training.evaluate(should_stop)
    averaged = training.evaluate_average(should_stop) if result is not None else None
    if result is None or (averaged is None and training.average is not None):
        return False
    state = training.state
    row = {
        "step": state.step,
        "epoch": round(state.samples_seen / training.plan.windows, 6),
        **_figures("eval_", result),
        **{key: value for name, part in result.sources.items() for key, value in _figures(f"eval_{name}_", part).items()},
        **(_figures("eval_ema_", averaged) if averaged else {}),
        "num_input_tokens_seen": state.tokens_seen,
    }
    options, text = training.settings[TrackingOptions], ""
    if options.sample_tokens and np.isfinite(result.loss):
        text = training.sample()
        # Before the row that says that this step was evaluated, and once: a run killed between the two writes both again.
        rewind(training.run / SAMPLES, state.step - 1)
        append_row(training.run / SAMPLES, {"step": state.step, "prompt": options.sample_prompt, "text": text})
    _log(training, sinks, row)
    parts = [f"; {name} {part.loss:.4f}" for name, part in result.sources.items()]
    parts += [f"; averaged weights {averaged.loss:.4f}"] if averaged else []
    progress.say(
        f"step {state.step:>6,} validation: loss {result.loss:.4f} | perplexity {perplexity_text(result.perplexity)} | "
        f"{result.bits_per_byte:.3f} bits per byte | token accuracy {result.token_accuracy:.1%} | {result.tokens:,} tokens"
        + "".join(parts)
    )
    if options.sample_tokens and np.isfinite(result.loss):
        progress.say(f"  sample: {json.dumps(options.sample_prompt + text, ensure_ascii=False)}")
    draw_curves(read_rows(training.run / METRICS), training.run, training.run.name)
    return True


def _figures(prefix: str, result: Evaluation) -> dict[str, float]:
    return {
        f"{prefix}loss": result.loss,
        f"{prefix}perplexity": result.perplexity,
        f"{prefix}bits_per_byte": result.bits_per_byte,
        f"{prefix}token_accuracy": result.token_accuracy,
        f"{prefix}tokens": result.tokens,
    }


def _log(training: Training, sinks: Sinks, row: dict[str, Any]) -> None:
    append_row(training.run / METRICS, row)
    sinks.log(row)


def _sinks(training: Training, say: Say) -> Sinks:
    names, run = training.settings[TrackingOptions].report_to, training.run
    config, step = training.settings.flat(), training.state.step
    return open_sinks(names, run, run_name=run.name, config=config, resumed_step=step, say=say)


def _step_row(training: Training, step: StepResult, tokens_per_second: float, peak: float) -> dict[str, Any]:
    shape = replace(training.model.config, n_positions=training.plan.sequence_length_at(step.step))
    row: dict[str, Any] = {
        "step": step.step,
        "epoch": round(step.epoch, 6),
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
        "num_input_tokens_seen": training.state.tokens_seen,
        "tokens_per_second": round(tokens_per_second, 1),
        "mfu": round(tokens_per_second * training_flops_per_token(shape) / peak, 5),
        "batch_digest": step.batch_digest,
    }
    if training.state.skipped_steps:
        row["skipped_steps"] = training.state.skipped_steps
    if training.course.loss_scaling:
        row["loss_scale"] = training.state.loss_scale
    if step.spike:
        row["spike"] = asdict(step.spike)
    if step.health:
        row["health"] = step.health
    return row


def _summary(training: Training, seconds: float) -> dict[str, Any]:
    run, rows = training.run, read_rows(training.run / METRICS)
    losses = {r["step"]: r["eval_loss"] for r in rows if r.get("eval_loss") is not None}
    best = best_saved(run, rows, training.settings[SelectionOptions])
    final = best_checkpoint(run) or next(reversed(checkpoints(run)), None)
    return {
        "steps": training.state.step,
        "final_checkpoint": str(final) if final else None,
        "best_checkpoint": str(run / f"checkpoint-{best.step}") if best else None,
        "eval_loss": losses.get(training.state.step),
        "num_input_tokens_seen": training.state.tokens_seen,
        "seconds": round(seconds, 3),
        "skipped_steps": training.state.skipped_steps,
    }
