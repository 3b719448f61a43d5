"""groundup train: text or a dataset to a model. What a run does, in order, is ``train``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from groundup.checkpoint.commit import checkpoints, step_of
from groundup.config.load import Settings
from groundup.config.options import BatchOptions, InitialWeightsOptions, ModelOptions, RunOptions, SpeedOptions
from groundup.errors import Stopped
from groundup.evaluation.measure import byte_frequency_baseline
from groundup.model.flops import parameter_count, training_flops_per_token
from groundup.recipes.training import SAMPLES, Training, open_training
from groundup.runtime.device import explained_memory_errors, peak_flops
from groundup.runtime.files import explained_os_errors
from groundup.runtime.signals import stop_requests
from groundup.tracking.metrics import METRICS, append_row, read_rows
from groundup.tracking.pictures import draw_curves
from groundup.tracking.progress import Progress, step_line
from groundup.training.loop import StepResult

Say = Callable[[str], None]
BASELINE_TOKENS = 2**24
"""Tokens per split that the byte-frequency baseline counts at most."""


def train(sources: Sequence[str], run: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """
    Train a model into the directory ``run``; the same call again goes on where the run stopped.

    Returns:
        What ``train --json`` prints: steps, final_checkpoint, best_checkpoint, eval_loss, num_input_tokens_seen, seconds.

    Raises:
        Stopped: a signal came; a checkpoint was saved.
        DivergedError: too many steps in a row were not finite.
    """
    with (
        explained_os_errors(run, "train"),
        explained_memory_errors(),
        open_training(sources, run, settings, progress.say) as training,
        stop_requests(progress.say) as should_stop,
    ):
        options, state, plan = settings[RunOptions], training.state, training.plan
        saved = state.step
        if state.step >= plan.total_steps:
            if options.eval_steps and not _evaluated(training):
                _evaluate(training, progress, should_stop)
            draw_curves(read_rows(run / METRICS), run, run.name)
            progress.say(f"run {run}: already complete at step {state.step:,}; raise --max-steps to go on")
            return _summary(training, 0.0)
        _describe(training, progress.say)
        peak, peak_origin = peak_flops(training.machine, settings[SpeedOptions].peak_tflops)
        progress.say(f"peak: {peak / 1e12:.2f} TFLOP/s ({peak_origin})")
        due = options.eval_steps and state.step % options.eval_steps == 0 and not _evaluated(training)
        if due and not _evaluate(training, progress, should_stop):
            raise _stopped(state.step, training.save())

        seconds = total_seconds = 0.0
        tokens = 0
        for step in training:
            seconds, total_seconds, tokens = seconds + step.seconds, total_seconds + step.seconds, tokens + step.tokens
            stopping = should_stop()
            last = stopping or step.step == plan.total_steps
            if step.skipped:
                progress.say(
                    f"step {step.step}: SKIPPED: loss {step.loss}, gradient norm {step.grad_norm} are not finite; "
                    f"nothing was updated ({state.skipped_steps} skipped so far)"
                )
            if step.step == 1 or step.step % options.logging_steps == 0 or last or step.skipped:
                row = _step_row(training, step, tokens / seconds, peak)
                append_row(run / METRICS, row)
                done = step.step - saved
                progress.step(step_line(row, plan.total_steps, total_seconds / done * (plan.total_steps - step.step)))
                seconds, tokens = 0.0, 0
            # Saved before it is evaluated: an evaluation that is killed loses no training.
            checkpoint = None
            if last or (options.save_steps and step.step % options.save_steps == 0):
                checkpoint = training.save()
            if stopping and checkpoint:
                raise _stopped(step.step, checkpoint)
            due = options.eval_steps and (last or step.step % options.eval_steps == 0)
            # An evaluation that a signal ended is made up for when the run goes on, from this very step.
            if due and not _evaluate(training, progress, should_stop):
                raise _stopped(step.step, checkpoint or training.save())
        draw_curves(read_rows(run / METRICS), run, run.name)
        return _summary(training, total_seconds)


def _stopped(step: int, checkpoint: Path) -> Stopped:
    return Stopped(f"stopped at step {step:,} by a signal; {checkpoint} is saved, the same command goes on")


def _describe(training: Training, say: Say) -> None:
    """The run in a few lines, before it starts."""
    plan, config = training.plan, training.model.config
    options, start = training.settings[ModelOptions], training.settings[InitialWeightsOptions].init_from
    tokenizer = training.dataset.tokenizer
    say(f"device: {training.machine.reason}")
    say(
        f"model: {start or options.model}, {parameter_count(training.model):,} parameters ({config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} wide, context {config.n_positions}, vocabulary {config.vocab_size:,})"
    )
    passes = len(plan.micro_batches)
    say(
        f"batch: {plan.tokens_per_step:,} tokens = {plan.windows_per_step} windows of {config.n_positions}, in {passes} "
        f"pass{'es' if passes > 1 else ''} of at most {training.settings[BatchOptions].per_device_train_batch_size}"
    )
    say(
        f"length: {plan.total_steps:,} steps = {plan.total_steps * plan.tokens_per_step:,} tokens = {plan.epochs:.2f} epochs "
        f"of {plan.windows:,} windows; warmup {plan.warmup_steps:,} steps"
    )
    train, validation = (training.dataset.stream(split) for split in ("train", "validation"))
    bits = byte_frequency_baseline(
        train.read(0, min(len(train), BASELINE_TOKENS)),
        validation.read(0, min(len(validation), BASELINE_TOKENS)),
        tokenizer.token_bytes,
    )
    say(
        f"to beat on validation: {bits:.3f} bits per byte by byte frequencies alone; "
        f"loss {np.log(config.vocab_size):.3f} by guessing evenly"
    )


def _evaluated(training: Training) -> bool:
    """Whether the evaluation of this step was logged before the run was interrupted."""
    rows = read_rows(training.run / METRICS)
    return any(row["step"] == training.state.step and "eval_loss" in row for row in rows)


def _evaluate(training: Training, progress: Progress, should_stop: Callable[[], bool]) -> bool:
    """Measure, log, sample and draw; False when a signal ended it."""
    result = training.evaluate(should_stop)
    if result is None:
        return False
    state, rows = training.state, training.run / METRICS
    append_row(
        rows,
        {
            "step": state.step,
            "epoch": round(state.samples_seen / training.plan.windows, 6),
            "eval_loss": result.loss,
            "eval_perplexity": result.perplexity,
            "eval_bits_per_byte": result.bits_per_byte,
            "eval_token_accuracy": result.token_accuracy,
            "eval_tokens": result.tokens,
            "num_input_tokens_seen": state.tokens_seen,
        },
    )
    progress.say(
        f"step {state.step:>6,} validation: loss {result.loss:.4f} | perplexity {result.perplexity:,.2f} | "
        f"{result.bits_per_byte:.3f} bits per byte | token accuracy {result.token_accuracy:.1%} | {result.tokens:,} tokens"
    )
    options = training.settings[RunOptions]
    if options.sample_tokens and np.isfinite(result.loss):
        text = training.sample()
        append_row(training.run / SAMPLES, {"step": state.step, "prompt": options.sample_prompt, "text": text})
        progress.say(f"  sample: {json.dumps(options.sample_prompt + text, ensure_ascii=False)}")
    draw_curves(read_rows(rows), training.run, training.run.name)
    return True


def _step_row(training: Training, step: StepResult, tokens_per_second: float, peak: float) -> dict[str, Any]:
    row = {
        "step": step.step,
        "epoch": round(step.epoch, 6),
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
        "num_input_tokens_seen": training.state.tokens_seen,
        "tokens_per_second": round(tokens_per_second, 1),
        "mfu": round(tokens_per_second * training_flops_per_token(training.model.config) / peak, 5),
        "batch_digest": step.batch_digest,
    }
    if training.state.skipped_steps:
        row["skipped_steps"] = training.state.skipped_steps
    return row


def _summary(training: Training, seconds: float) -> dict[str, Any]:
    losses = {r["step"]: r["eval_loss"] for r in read_rows(training.run / METRICS) if r.get("eval_loss") is not None}
    saved = checkpoints(training.run)
    measured = [path for path in saved if step_of(path) in losses]
    best = min(measured, key=lambda path: losses[step_of(path)], default=None)
    return {
        "steps": training.state.step,
        "final_checkpoint": str(saved[-1]) if saved else None,
        "best_checkpoint": str(best) if best else None,
        "eval_loss": losses.get(training.state.step),
        "num_input_tokens_seen": training.state.tokens_seen,
        "seconds": round(seconds, 3),
        "skipped_steps": training.state.skipped_steps,
    }
