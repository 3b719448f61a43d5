"""
Is this run going well? Verdicts on the rows of a metrics.jsonl, of a run that has ended or is still going on.

Pure functions of the rows: nothing is opened here. Every bound is beside its reason; the noise of a curve is estimated from the
curve itself, so that a small batch does not look like a fault.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundup.diagnostics.check import Check
from groundup.evaluation.curves import LEAST_LOSS, RISE, Series, never_better, noise, risen, turned
from groundup.tracking.metrics import number
from groundup.training.spikes import judge

Rows = Sequence[Mapping[str, Any]]

LEAST_ROWS = 10
"""With fewer points nothing is said of a curve."""
LEARNED_BY_STEP, LEARNED_SHARE = 100, 0.98
"""
By so many steps a loss is below this share of ln V. The frequencies of tokens alone bring more than that, and the slowest of
the forty settings that were measured (benchmarks/history/settings.jsonl) was at 0.62 of it after 100 steps.
"""
FAR_ABOVE = 1.1
"""Times ln V: who guesses evenly is not so far off, so a run that is has been thrown there."""
RISE_SHARE = 0.1
"""A run has diverged where it has lost this share of what it had gained, beyond its noise."""
FLAT_SHARE = 0.005
"""A loss that falls by less than this over the last part of a run stands still; healthy runs of 500 steps fell by 3 % or so."""
PEAK_SHARE = 0.4
"""Where the learning rate is below this share of its peak, a loss may well stand still."""
SPIKE_SHARE, SPIKES = 0.002, 2
"""More spikes than this share of the steps, and than so many, are no accident: PaLM's training had about 20 in all (Chowdhery
et al. 2022, section 5.1)."""
SPIKE_THRESHOLD, SPIKE_WINDOW = 8.0, 100
"""Those of the run's own judge (training/spikes.py), where it was switched off."""
SKIPPED_SHARE, SKIPPED_BY_FP16 = 0.01, 20
"""Of the steps; and while fp16 looks for its loss scale."""
ONE_EVENT_STEPS = 10
"""Spikes so close to each other are one: the same jump, or the way back from it."""
SLOWER, ROWS_AFTER = 0.4, 20
UTILISATION = {512: 0.05, 128: 0.003, 0: 0.0}
"""
Model FLOPs utilisation below which a model at least so wide is far under the machine's peak. Wide models reach 0.2 to 0.5
(PaLM, table 3); a narrow one has small products: of 128 wide it was 0.02 to 0.06 on two cores, of 16 wide 0.0003. A GPU is not
filled by a narrow one.
"""
LOADER_SHARE = 1.25
"""The loader must be so much faster than the training by itself, because both run at the same time."""


@dataclass(frozen=True)
class RunFacts:
    """What is known about a run beside its rows."""

    vocab_size: int
    total_steps: int = 0
    """Planned; 0 is not known."""
    max_grad_norm: float = 0.0
    """0 does not clip."""
    n_embd: int = 0
    device: str = "cpu"
    fp16: bool = False


def examine_run(rows: Rows, facts: RunFacts) -> Iterator[Check]:
    """Everything that the rows of one run say."""
    steps = [row for row in rows if "loss" in row]
    if not steps:
        yield _check("run_progress", None, "no step is logged yet", "logged steps", "")
        return
    yield progress_check(rows, facts)
    yield divergence_check(rows, facts)
    yield plateau_check(rows, facts)
    yield overfitting_check(rows)
    yield spike_check(rows)
    yield skipped_check(rows, facts)
    yield gradient_norm_check(rows, facts)
    yield throughput_check(rows, facts)


NAMES = (
    "run_progress", "run_divergence", "run_plateau", "run_overfitting", "run_spikes", "run_skipped_steps", "run_gradient_norm",
    "run_throughput",
)  # fmt: skip


def progress_check(rows: Rows, facts: RunFacts) -> Check:
    """Has it learned anything: is the loss below that of guessing evenly, and was validation ever better than at first?"""
    steps, losses = series(rows, "loss")
    guess = math.log(facts.vocab_size)
    expected = f"below {LEARNED_SHARE * guess:.3f} after {LEARNED_BY_STEP} steps; guessing evenly is {guess:.3f}"
    if not len(losses):
        return _check("run_progress", False, "every logged loss is not finite", expected, _CALMER, "diverged")
    done = f"step {int(steps[-1]):,}" + (f" of {facts.total_steps:,}" if facts.total_steps else "")
    now = float(np.median(losses[-5:]))
    measured = f"loss {losses[0]:.3f} at first, {now:.3f} at {done}"
    if steps[-1] < LEARNED_BY_STEP:
        return _check("run_progress", None, f"{measured}: too early to tell", expected, "")
    passed = now < LEARNED_SHARE * guess
    evaluated, evals = series(rows, "eval_loss")
    if passed and never_better(evals):
        measured += f"; validation was best at step {int(evaluated[0]):,}, {evals[0]:.3f}, and is {evals[-1]:.3f} now"
        advice = "what it learned does not hold for other text: lower --learning-rate, give more text, look at the data checks"
        return _check("run_progress", False, measured, f"{expected}; a validation loss below its first", advice, "not_learning")
    if now > FAR_ABOVE * guess:
        return _check("run_progress", False, f"{measured}: far above guessing evenly", expected, _CALMER, "diverged")
    advice = "raise --learning-rate, see that little is frozen (--freeze), and run the checks of the model and of learning"
    return _check("run_progress", passed, measured, expected, "" if passed else advice, "" if passed else "not_learning")


def divergence_check(rows: Rows, facts: RunFacts) -> Check:
    """Has the training loss come back up, for good?"""
    expected = f"a loss that has not lost {RISE_SHARE:.0%} of what it had gained"
    trained = [row for row in rows if "loss" in row]
    lost = [row["step"] for row in trained[-3:] if not _is_number(row["loss"])]
    if lost and len(lost) == min(3, len(trained)):
        return _check(
            "run_divergence", False, f"the last losses, from step {lost[0]:,} on, are not finite", expected, _CALMER, "diverged"
        )
    steps, losses = series(rows, "loss")
    if len(losses) < LEAST_ROWS:
        return _check("run_divergence", None, f"{len(losses)} logged losses", f"{LEAST_ROWS} or more", "")
    width = max(5, len(losses) // 10)
    smooth = _rolling_median(losses, width)
    best = int(np.argmin(smooth))
    rise, gained = float(smooth[-1] - smooth[best]), float(smooth.max() - smooth[best])
    # The standard error of a median is 1.25 σ / √n; two are compared, and the lower was chosen among many.
    bound = max(RISE_SHARE * gained, 5 * 1.25 * noise(losses) * math.sqrt(2 / width))
    if smooth[-1] > FAR_ABOVE * math.log(facts.vocab_size) and smooth[-1] > losses[0]:
        measured = f"loss {losses[0]:.3f} at step {int(steps[0]):,}, {smooth[-1]:.3f} now (median of {width} logged steps)"
        details = {"onset_step": int(steps[0]), "rise": float(smooth[-1] - losses[0]), "bound": 0.0}
        return _check("run_divergence", False, measured, "a loss below that of guessing evenly", _CALMER, "diverged", details)
    passed = rise <= bound
    # The lowest of a noisy, flat stretch may be anywhere in it: the rise begins where it was last about as low.
    low = int(np.flatnonzero(smooth <= smooth[best] + bound / 2)[-1]) if bound else best
    onset = int(steps[low + width - 1])
    measured = f"loss {smooth[best]:.3f} at the lowest, {smooth[-1]:.3f} now (medians of {width} logged steps)"
    measured += "" if passed else f"; it rises from step {onset:,} on"
    details = {"onset_step": onset, "rise": rise, "bound": bound}
    return _check(
        "run_divergence", passed, measured, expected, "" if passed else _CALMER, "" if passed else "diverged", details
    )


_CALMER = "lower --learning-rate, lengthen --warmup-steps, keep --max-grad-norm 1; look at the texts in spikes/"


def plateau_check(rows: Rows, facts: RunFacts) -> Check:
    """
    Does the loss stand still although the learning rate is high?

    Two ways to be sure: the line through the training losses of the last third, with its standard error; and the validation
    losses of the last 60 %, which have hardly any noise.
    """
    expected = f"a loss that falls by more than {FLAT_SHARE:.1%} while the learning rate is above {PEAK_SHARE:g} of its peak"
    steps, losses = series(rows, "loss")
    if len(losses) < LEAST_ROWS:
        return _check("run_plateau", None, f"{len(losses)} logged losses", f"{LEAST_ROWS} or more", "")
    third = slice(len(losses) * 2 // 3, None)
    fall, error = _fall(losses[third])
    level = max(float(losses[third].mean()), LEAST_LOSS)
    if level > FAR_ABOVE * math.log(facts.vocab_size):
        return _check("run_plateau", None, f"loss {level:.3f}: far above guessing evenly", "a run that has not diverged", "")
    measured = f"over the last third of the steps the loss fell by {fall / level:.1%} ± {2 * error / level:.1%}, "
    measured += f"to {losses[third][-5:].mean():.3f}"
    details: dict[str, Any] = {"fall": fall, "fall_error": error, "level": level}
    rate = _rate_share(rows, float(steps[third].mean()))
    details["learning_rate_share"] = rate
    # Twice the error on top: only where one can be sure that it does not fall. A rising loss is another matter.
    still = len(losses) >= 3 * LEAST_ROWS and abs(fall) + 2 * error < FLAT_SHARE * level and rate >= PEAK_SHARE
    eval_steps, evals = series(rows, "eval_loss")
    late = evals[eval_steps >= 0.4 * eval_steps[-1]] if len(evals) else evals
    if not still and len(late) >= 3 and eval_steps[-1] >= LEARNED_BY_STEP:
        begin = float(eval_steps[eval_steps >= 0.4 * eval_steps[-1]][0])
        since = losses[steps >= 0.4 * eval_steps[-1]]
        # Where the training loss falls, or validation rises, it does not stand still: that is overfitting.
        since_fall, since_error = _fall(since) if len(since) >= 3 else (0.0, 0.0)
        falling = since_fall > 0.02 * level + 2 * since_error or late[-1] > (1 + RISE) * late.min()
        drop = float(late[0] - late.min())
        if drop < FLAT_SHARE * late[0] and not falling and _rate_share(rows, begin) >= PEAK_SHARE:
            still = True
            share = drop / max(float(late[0]), LEAST_LOSS)
            measured = f"over the last 60 % of the run validation fell by {share:.2%}, to {late.min():.3f}"
            details["validation_fall"] = drop
    advice = ""
    if still:
        advice = (
            "more steps like these bring nothing: let the rate fall (a schedule with decay), take a larger --model or more text"
        )
        if level > 0.5 * math.log(facts.vocab_size):
            advice = "it stands still far too high: try another --learning-rate, and run the checks of the model"
    return _check("run_plateau", not still, measured, expected, advice, "plateau" if still else "", details)


def overfitting_check(rows: Rows) -> Check:
    """Has validation turned, and where?"""
    expected = f"a last validation loss less than {RISE:.0%} above the lowest, or a training loss that rose too"
    steps, losses = series(rows, "eval_loss")
    if len(losses) < 3:
        return _check("run_overfitting", None, f"evaluated {len(losses)} times so far", "3 times or more", "")
    best = int(np.argmin(losses))
    measured = (
        f"lowest validation loss {losses[best]:.4f} at step {int(steps[best]):,}, {losses[-1]:.4f} at step {int(steps[-1]):,}"
    )
    details = {"best_step": int(steps[best]), "rise_share": risen(losses)}
    if not turned(steps, losses, *series(rows, "loss")):
        return _check("run_overfitting", True, measured, expected, "", details=details)
    epochs = [row["epoch"] for row in rows if row.get("step") == steps[best] and _is_number(row.get("epoch"))]
    passes = f" (after {epochs[-1]:.1f} epochs)" if epochs else ""
    advice = (
        f"stop near step {int(steps[best]):,}{passes}: --load-best-model-at-end, --early-stopping-patience 3; or more text, "
    )
    advice += "dropout (--resid-pdrop 0.1), a smaller --model"
    return _check("run_overfitting", False, measured, expected, advice, "overfitting", details)


def spike_check(rows: Rows) -> Check:
    """How often did loss or gradient jump, and did the loss come back?"""
    found = spikes(rows)
    steps, losses = series(rows, "loss")
    last = int(max((row["step"] for row in rows), default=0))
    events = [step for step, before in zip(found, [-ONE_EVENT_STEPS, *found], strict=False) if step - before >= ONE_EVENT_STEPS]
    most = max(SPIKES, round(SPIKE_SHARE * last))
    expected = f"at most {most} in {last:,} steps, and a loss that comes back"
    if len(losses) < LEAST_ROWS:
        return _check("run_spikes", None, f"{len(losses)} logged losses", f"{LEAST_ROWS} or more", "")
    if not found:
        return _check("run_spikes", True, f"none in {last:,} steps", expected, "")
    lasting = [step for step in found if not _came_back(steps, losses, step)]
    shown = ", ".join(f"{step:,}" for step in events[:5]) + (", …" if len(events) > 5 else "")
    measured = f"{len(events)} spike{'s' if len(events) > 1 else ''}, at step {shown}"
    details = {"steps": found, "events": events, "lasting": lasting}
    if lasting:
        advice = "go back to a checkpoint before it, with --spike-action rollback; or lower --learning-rate"
        measured += f"; after step {lasting[0]:,} the loss did not come back"
        return _check("run_spikes", False, measured, expected, advice, "spikes", details)
    measured += "; the loss came back"
    passed = len(events) <= most
    advice = "" if passed else "read the texts in spikes/: if they are rubbish take them out, else lower --learning-rate"
    return _check("run_spikes", passed, measured, expected, advice, "" if passed else "spikes", details)


def spikes(rows: Rows) -> list[int]:
    """The steps that stood out: those that the run itself found, or, where it looked for none, those among the logged ones."""
    own = [int(row["step"]) for row in rows if row.get("spike")]
    if own:
        return own
    found: list[int] = []
    losses: list[float] = []
    norms: list[float] = []
    for row in rows:
        if not (_is_number(row.get("loss")) and _is_number(row.get("grad_norm"))):
            continue
        loss, norm = float(row["loss"]), float(row["grad_norm"])
        if judge(losses[-SPIKE_WINDOW:], norms[-SPIKE_WINDOW:], loss, norm, SPIKE_THRESHOLD):
            found.append(int(row["step"]))
        losses.append(loss)
        norms.append(norm)
    return found


def skipped_check(rows: Rows, facts: RunFacts) -> Check:
    """How many steps taught nothing, because loss or gradient was not finite, or a spike was passed over?"""
    last = int(max(row["step"] for row in rows))
    skipped = max((int(row["skipped_steps"]) for row in rows if _is_number(row.get("skipped_steps"))), default=0)
    scales = [float(row["loss_scale"]) for row in rows if _is_number(row.get("loss_scale"))]
    allowed = max(2, round(SKIPPED_SHARE * last)) + (SKIPPED_BY_FP16 if facts.fp16 or scales else 0)
    measured = f"{skipped:,} of {last:,} steps skipped" + (f", loss scale {scales[-1]:g}" if scales else "")
    expected = f"at most {allowed:,}" + (", a loss scale of 1 or more" if scales else "")
    passed = skipped <= allowed and not (scales and scales[-1] < 1)
    advice = (
        "take bf16, or float32 (--no-bf16)"
        if scales
        else "lower --learning-rate; look at the texts in spikes/, and try --no-bf16"
    )
    return _check("run_skipped_steps", passed, measured, expected, "" if passed else advice, "" if passed else "not_finite")


def gradient_norm_check(rows: Rows, facts: RunFacts) -> Check:
    """Is the gradient of a size that can be learned from?"""
    steps, norms = series(rows, "grad_norm")
    later = norms[len(norms) // 2 :]
    highest = 10 * facts.max_grad_norm if facts.max_grad_norm else 100.0
    expected = f"between 1e-5 and {highest:g}" + (" (ten times --max-grad-norm)" if facts.max_grad_norm else "")
    if len(norms) < LEAST_ROWS:
        return _check("run_gradient_norm", None, f"{len(norms)} logged norms", f"{LEAST_ROWS} or more", "")
    middle = float(np.median(later))
    clipped = float((later > facts.max_grad_norm).mean()) if facts.max_grad_norm else 0.0
    measured = f"median {middle:.3g} over the last half" + (
        f", above --max-grad-norm in {clipped:.0%} of it" if clipped else ""
    )
    details = {"median": middle, "clipped_share": clipped}
    if middle > highest:
        advice = "the gradient explodes: lower --learning-rate or --initializer-range, keep --norm layer; see --health-steps"
        return _check("run_gradient_norm", False, measured, expected, advice, "exploding_gradients", details)
    if middle < 1e-5:
        advice = "the gradient vanishes: see that not everything is frozen, keep --norm layer and --norm-position pre"
        return _check("run_gradient_norm", False, measured, expected, advice, "vanishing_gradients", details)
    return _check("run_gradient_norm", True, measured, expected, "", details=details)


def throughput_check(rows: Rows, facts: RunFacts) -> Check:
    """Is the run as fast as the machine lets it be, and as fast as it was?"""
    _, speeds = series(rows[1:], "tokens_per_second")
    _, shares = series(rows[1:], "mfu")
    if len(speeds) < LEAST_ROWS or len(shares) < LEAST_ROWS:
        return _check("run_throughput", None, f"{len(speeds)} logged speeds", f"{LEAST_ROWS} or more", "")
    usual, share = float(np.median(speeds)), float(np.median(shares))
    late = float(np.median(speeds[-max(5, len(speeds) // 10) :]))
    width = next(width for width in UTILISATION if facts.n_embd >= width)
    least = 0.0 if facts.device != "cpu" and width < 512 else UTILISATION[width]
    measured = f"{usual:,.0f} tokens/s, {share:.1%} of the machine's peak; lately {late:,.0f}"
    expected = f"at least {least:.1%} of the peak for a model {facts.n_embd} wide, and now " if least else "now "
    expected += f"at least {SLOWER:.0%} of its own speed"
    details = {"tokens_per_second": usual, "mfu": share, "lately": late}
    if late < SLOWER * usual:
        advice = "it has become slower: see what else runs on this machine, its temperature, and whether memory is swapped"
        return _check("run_throughput", False, measured, expected, advice, "slower_than_before", details)
    if share < least:
        advice = (
            "larger passes (--per-device-train-batch-size auto), --torch-compile, --bf16 where `groundup doctor` finds it fast"
        )
        return _check("run_throughput", False, measured, expected, advice, "slow", details)
    return _check("run_throughput", True, measured, expected, "", details=details)


def loader_check(loader_speed: float, training_speed: float) -> Check:
    """
    Can the loader feed the training? metrics.jsonl says only how long a step took in all, so the loader is run alone.

    Args:
        loader_speed: tokens per second of reading batches, without training.
        training_speed: tokens per second of training, waiting included.
    """
    ratio = loader_speed / training_speed if training_speed else math.inf
    measured = f"{loader_speed:,.0f} tokens/s read alone, {ratio:,.1f} times the {training_speed:,.0f} of training"
    passed = ratio >= LOADER_SHARE
    advice = "training waits for data: put the dataset on a local, faster disk, or prepare it with larger --shard-tokens"
    details = {"loader_tokens_per_second": loader_speed, "tokens_per_second": training_speed}
    return _check("run_loader", passed, measured, f"{LOADER_SHARE:g} times or more", "" if passed else advice,
                  "" if passed else "starved_loader", details)  # fmt: skip


def series(rows: Rows, name: str) -> tuple[Series, Series]:
    """The steps that have a finite value of this name, and the values; both (N,)."""
    found = [(row["step"], row[name]) for row in rows if _is_number(row.get("step")) and _is_number(row.get(name))]
    table = np.array(found, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _check(name: str, passed: bool | None, measured: str, expected: str, advice: str, culprit: str = "",
           details: dict[str, Any] | None = None) -> Check:  # fmt: skip
    return Check(name, "run", passed, measured, expected, advice, culprit, details)


def _is_number(value: object) -> bool:
    return not math.isnan(number(value))


def _rolling_median(values: Series, width: int) -> Series:
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    medians: Series = np.median(windows, axis=1)
    return medians


def _fall(values: Series) -> tuple[float, float]:
    """By how much the line through some values falls from the first to the last, and its standard error."""
    places = np.arange(len(values), dtype=np.float64)
    slope, start = np.polyfit(places, values, 1)
    scatter = float(np.std(values - (slope * places + start), ddof=min(2, len(values) - 1)))
    return float(-slope * len(values)), scatter * math.sqrt(12 / len(values))


def _rate_share(rows: Rows, step: float) -> float:
    """The learning rate at the logged step that is nearest, as a share of the highest so far; 1 where none is logged."""
    steps, rates = series(rows, "learning_rate")
    if not len(rates) or rates.max() <= 0:
        return 1.0
    return float(rates[int(np.argmin(np.abs(steps - step)))] / rates.max())


def _came_back(steps: Series, losses: Series, spike: int) -> bool:
    """Whether the losses after a spike are those before it; True while there are too few to tell."""
    before, after = losses[steps < spike][-ROWS_AFTER:], losses[steps > spike][:ROWS_AFTER]
    if len(before) < 5 or len(after) < 10:
        return True
    usual = float(np.median(before))
    return float(np.median(after[-5:])) <= usual + max(4 * noise(losses), 0.05 * abs(usual))
