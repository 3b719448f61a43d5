"""How a run went, in words: each line a tone and a text, the first line is the headline."""

import math
from collections.abc import Mapping
from typing import Any

from groundup.tracking.progress import duration

GOOD, WARNING, BAD, PLAIN = "good", "warning", "bad", "plain"
MANY_SKIPPED = 0.01
"""Of the steps: more that were skipped is a matter of the settings, not of the data."""
Line = dict[str, str]


def story(run: Mapping[str, Any]) -> list[Line]:
    """
    How a run went, and what to do next.

    Args:
        run: as ``run_data`` makes it, but for its story.
    """
    if not run["rows"] and not run["totals"]["evaluations"]:
        return _begun(run)
    return [_headline(run), *_losses(run), *_learning(run), *_trouble(run), *_speed(run), *_next(run)]


def ended_badly(run: Mapping[str, Any]) -> bool:
    """Whether a run stopped because of its numbers: its last step was skipped."""
    return bool(run["totals"]["ends_skipped"]) and not run["state"]["running"]


def _begun(run: Mapping[str, Any]) -> list[Line]:
    going = run["state"]["running"]
    head = (
        "has just begun: no step is logged yet." if going else "holds no logged step: it ended before the first, or was moved."
    )
    advice = "Look again in a minute." if going else "Start it again: the same command goes on where it stopped."
    return [_line(PLAIN, f"This run {head}"), _line(PLAIN, advice)]


def _headline(run: Mapping[str, Any]) -> Line:
    totals, state = run["totals"], run["state"]
    step, planned = totals["step"], state["planned_steps"]
    of = f"{step:,} of {planned:,} steps" if planned and planned > step else f"{step:,} steps"
    loss, climbed = _end_loss(totals), totals["climbed"]
    if ended_badly(run):
        return _line(BAD, f"Diverged at step {step:,}: its last steps had no finite loss or gradient.")
    if climbed:
        rise = f"from {_loss(climbed['loss'])} to {_loss(climbed['end'])}"
        return _line(BAD, f"Went wrong after step {climbed['step']:,}: training loss climbed {rise}.")
    how = f"loss {loss}" if loss else "no loss yet"
    if totals["overfitting"]:
        found = totals["overfitting"]
        how = "Going on, but overfitting" if state["running"] else "Learned, then overfitted"
        best = f"best at step {found['step']:,} of {step:,}, validation loss {_loss(found['loss'])}"
        return _line(WARNING, f"{how}: {best}.")
    if totals["never_better"]:
        first, last = totals["first_evaluation"], totals["last_evaluation"]
        how = "Going on, but nothing learned so far" if state["running"] else "Learned nothing that holds for other text"
        rise = f"{_loss(first['loss'])}, and is {_loss(last['loss'])} at step {last['step']:,}"
        return _line(BAD, f"{how}: validation loss was lowest at step {first['step']:,}, {rise}.")
    if state["running"]:
        return _line(PLAIN, f"Going on: {of}, {how}.")
    if planned and step < planned:
        return _line(WARNING, f"Stopped at {of}, {how}.")
    return _line(GOOD if loss else PLAIN, f"Finished {of}, {how}.")


def _end_loss(totals: Mapping[str, Any]) -> str:
    last = totals["last_evaluation"]
    if last:
        return f"{_loss(last['loss'])} on validation"
    return f"{_loss(totals['loss'])} on training text" if totals["loss"] is not None else ""


def _losses(run: Mapping[str, Any]) -> list[Line]:
    totals, lines = run["totals"], []
    first, loss, best = totals["first_loss"], totals["loss"], totals["best_evaluation"]
    if first is not None and loss is not None:
        vocabulary = run["data"].get("vocab_size")
        guess = (
            f" (guessing evenly would be {math.log(vocabulary):.2f})" if isinstance(vocabulary, int) and vocabulary > 1 else ""
        )
        lines.append(_line(PLAIN, f"Training loss went from {_loss(first)} to {_loss(loss)} nats per token{guess}."))
    if best:
        more = [f"perplexity {best['perplexity']:,.4g}"] if best["perplexity"] is not None else []
        more += [f"{best['bits_per_byte']:.3f} bits per byte"] if best["bits_per_byte"] is not None else []
        more += [f"{best['token_accuracy']:.1%} of tokens right"] if best["token_accuracy"] is not None else []
        rest = f": {', '.join(more)}" if more else ""
        lines.append(_line(PLAIN, f"Best validation loss {_loss(best['loss'])}, at step {best['step']:,}{rest}."))
    elif run["rows"]:
        lines.append(
            _line(
                WARNING, "Nothing was evaluated: without validation, nobody sees what was learned by heart. Set --eval-steps."
            )
        )
    return lines


def _learning(run: Mapping[str, Any]) -> list[Line]:
    totals = run["totals"]
    if found := totals["overfitting"]:
        return [_line(
            WARNING,
            f"From step {found['step']:,} on it learned its text by heart: validation loss rose from {_loss(found['loss'])} to "
            f"{_loss(found['rose_to'])} while training loss kept falling.",
        )]  # fmt: skip
    if totals["climbed"] or totals["never_better"] or ended_badly(run) or totals["still_falling"] is None:
        return []
    if totals["still_falling"]:
        return [_line(PLAIN, "Validation loss was still falling in the last quarter: it had not learned all that it can.")]
    return [_line(PLAIN, "Validation loss hardly moved in the last quarter.")]


def _trouble(run: Mapping[str, Any]) -> list[Line]:
    totals, parts = run["totals"], []
    for key, one, many in (
        ("skipped", "step was skipped, not finite", "steps were skipped, not finite"),
        ("spikes", "spike", "spikes"),
        ("rollbacks", "time it went back to a checkpoint", "times it went back to a checkpoint"),
        ("resumes", "time it was interrupted and went on", "times it was interrupted and went on"),
    ):
        if count := totals[key]:
            parts.append(f"{count:,} {one if count == 1 else many}")
    if not parts:
        return [_line(GOOD, "Nothing unusual: no step was skipped, no spike.")]
    serious = totals["skipped"] > MANY_SKIPPED * max(1, run["rows"]) or totals["rollbacks"]
    return [_line(WARNING if serious or totals["spikes"] else PLAIN, f"Unusual: {'; '.join(parts)}.")]


def _speed(run: Mapping[str, Any]) -> list[Line]:
    totals = run["totals"]
    speed, tokens, seconds = totals["tokens_per_second"], totals["tokens"], totals["seconds"]
    if not speed or not tokens:
        return []
    epochs = f", {totals['epochs']:.2f} epochs" if totals["epochs"] else ""
    spent = f"; {duration(seconds)} of training" if seconds else ""
    left, planned = "", run["state"]["planned_steps"]
    if run["state"]["running"] and planned and seconds and 0 < totals["step"] < planned:
        left = f", about {duration(seconds / totals['step'] * (planned - totals['step']))} to go"
    return [_line(PLAIN, f"It read {tokens:,.0f} tokens{epochs}, {speed:,.0f} a second{spent}{left}.")]


def _next(run: Mapping[str, Any]) -> list[Line]:
    """What to do: the one thing that matters most."""
    totals, state, config = run["totals"], run["state"], run["config"]
    rate = config.get("learning_rate")
    lower = f" (now {rate:g})" if isinstance(rate, int | float) else ""
    if ended_badly(run) or totals["climbed"]:
        return [_line(BAD, f"Next: lower --learning-rate{lower}, lengthen --warmup-steps, and keep --max-grad-norm at 1.")]
    if totals["skipped"] > MANY_SKIPPED * max(1, run["rows"]):
        return [_line(WARNING, f"Next: too many steps were skipped; lower --learning-rate{lower}.")]
    if found := totals["overfitting"]:
        saved = f"checkpoint-{found['step']}"
        use = f"use {saved}" if saved in run["machine"]["checkpoints"] else "keep the best with --load-best-model-at-end"
        return [_line(WARNING, f"Next: {use}; more text helps most, then dropout (--resid-pdrop 0.1), then a smaller model.")]
    if totals["never_better"]:
        return [_line(BAD, f"Next: lower --learning-rate{lower}, and run `groundup doctor` on this run.")]
    if state["running"]:
        return []
    if state["planned_steps"] and totals["step"] < state["planned_steps"]:
        return [_line(PLAIN, "Next: the same command goes on where it stopped.")]
    if totals["still_falling"]:
        return [_line(PLAIN, "Next: train longer; raise --max-steps and give the same command again.")]
    if totals["still_falling"] is False:
        return [
            _line(PLAIN, "Next: longer training will bring little; try a larger model, more text or another learning rate.")
        ]
    return []


def _loss(value: float) -> str:
    """A loss; one that has exploded without digits that mean nothing."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _line(tone: str, text: str) -> Line:
    return {"tone": tone, "text": text}
