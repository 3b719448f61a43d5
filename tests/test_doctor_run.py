"""doctor on the rows of a run: curves of each kind are told apart, and healthy ones raise no alarm."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from groundup.diagnostics import references
from groundup.diagnostics.check import Check
from groundup.diagnostics.references import (
    REFERENCES,
    TINY_SHAKESPEARE,
    Standing,
    baseline_check,
    law_loss,
    reference_check,
)
from groundup.diagnostics.run import NAMES, RunFacts, examine_run, loader_check

VOCABULARY = 512
FACTS = RunFacts(vocab_size=VOCABULARY, total_steps=1000, max_grad_norm=1.0, n_embd=256)
HISTORY = Path(__file__).parents[1] / "benchmarks" / "history" / "settings.jsonl"


def rates(steps: int, schedule: str) -> np.ndarray:
    at = np.arange(1, steps + 1)
    warmup = np.minimum(1.0, at / max(1, steps // 20))
    falling = 0.1 + 0.45 * (1 + np.cos(np.pi * at / steps))
    return 1e-3 * warmup * (falling if schedule == "cosine" else 1.0)


def curve(steps: int, floor: float, power: float) -> np.ndarray:
    """A loss that falls as a power of the step, from ln V on."""
    at = np.arange(1, steps + 1)
    return floor + (math.log(VOCABULARY) - floor) * (1 + at / 8) ** -power


def rows_of(losses: np.ndarray, *, schedule: str = "cosine", noise: float = 0.02, seed: int = 0, every: int = 10,
            evals: np.ndarray | None = None, norms: np.ndarray | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """The metrics.jsonl of a run with these losses, logged every so many steps."""
    draw = np.random.default_rng(seed)
    steps = len(losses)
    evals = losses + 0.03 if evals is None else evals
    norms = 0.4 * np.exp(draw.normal(0, 0.15, steps)) if norms is None else norms
    noisy = losses + draw.normal(0, noise, steps)
    rate = rates(steps, schedule)
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": math.log(VOCABULARY)}]
    for step in range(1, steps + 1):
        if step == 1 or step % every == 0:
            loss = float(noisy[step - 1])
            rows.append(
                {
                    "step": step, "epoch": step / 200, "loss": loss if math.isfinite(loss) else None,
                    "grad_norm": float(norms[step - 1]), "learning_rate": float(rate[step - 1]),
                    "tokens_per_second": 5000.0 + float(draw.normal(0, 300)), "mfu": 0.1, "num_input_tokens_seen": step * 4096,
                }
            )  # fmt: skip
        if step % (steps // 10) == 0 and math.isfinite(evals[step - 1]):
            rows.append({"step": step, "eval_loss": float(evals[step - 1]), "num_input_tokens_seen": step * 4096})
    return rows


def verdicts(rows: list[dict[str, Any]], facts: RunFacts = FACTS) -> dict[str, Check]:
    return {check.name: check for check in examine_run(rows, facts)}


def alarms(rows: list[dict[str, Any]], facts: RunFacts = FACTS) -> list[str]:
    return [name for name, check in verdicts(rows, facts).items() if check.passed is False]


@hypothesis_settings(max_examples=200)
@given(
    steps=st.integers(100, 3000),
    floor=st.floats(0.5, 4.0),
    power=st.floats(0.35, 1.2),
    noise=st.floats(0.0, 0.15),
    schedule=st.sampled_from(["cosine", "constant"]),
    every=st.sampled_from([1, 5, 10, 25]),
    seed=st.integers(0, 10_000),
)
def test_a_healthy_curve_raises_no_alarm(
    steps: int, floor: float, power: float, noise: float, schedule: str, every: int, seed: int
) -> None:
    losses = curve(steps, floor, power)
    # One that has come to its floor stands still, and is told so: that is another curve.
    late = losses[int(0.4 * steps)]
    if schedule == "constant" and late - losses[-1] < 0.02 * late:
        return
    if late - losses[-1] < 0.01 * late:
        return
    assert alarms(rows_of(losses, schedule=schedule, noise=noise, every=every, seed=seed)) == []


@hypothesis_settings(max_examples=60)
@given(
    steps=st.integers(400, 2000),
    turn=st.floats(0.3, 0.8),
    height=st.floats(0.8, 3.0),
    noise=st.floats(0.0, 0.1),
    seed=st.integers(0, 10_000),
)
def test_a_loss_that_climbs_back_has_diverged(steps: int, turn: float, height: float, noise: float, seed: int) -> None:
    losses, start = curve(steps, 2.0, 0.6), int(turn * steps)
    climb = np.arange(steps - start) / (steps - start)
    losses[start:] = losses[start] + height * np.minimum(1, 3 * climb)
    found = verdicts(rows_of(losses, noise=noise, seed=seed))["run_divergence"]
    assert found.passed is False
    assert found.culprit == "diverged"
    assert found.details is not None
    assert abs(found.details["onset_step"] - start) < 0.25 * steps


def test_losses_that_are_not_finite_have_diverged() -> None:
    losses = curve(300, 2.0, 0.6)
    losses[200:] = np.nan
    found = verdicts(rows_of(losses))["run_divergence"]
    assert found.passed is False
    assert "not finite" in found.measured
    assert "run_divergence" in alarms(rows_of(np.full(300, np.nan)))


@hypothesis_settings(max_examples=60)
@given(
    steps=st.integers(600, 3000), level=st.floats(2.0, 5.5), noise=st.floats(0.0, 0.05), seed=st.integers(0, 10_000),
    schedule=st.sampled_from(["cosine", "constant"]),
)  # fmt: skip
def test_a_loss_that_stands_still_at_a_high_rate_is_a_plateau(
    steps: int, level: float, noise: float, seed: int, schedule: str
) -> None:
    at = np.arange(1, steps + 1)
    losses = level + (math.log(VOCABULARY) - level) * np.exp(-at / (steps * 0.04))
    found = verdicts(rows_of(losses, noise=noise, seed=seed, schedule=schedule))
    assert found["run_plateau"].passed is False
    assert found["run_overfitting"].passed


def test_a_loss_that_stands_still_because_the_rate_has_fallen_is_none() -> None:
    losses = curve(1000, 2.0, 0.6)
    losses[700:] = losses[700]
    assert alarms(rows_of(losses, schedule="cosine")) == []


@hypothesis_settings(max_examples=60)
@given(
    steps=st.integers(300, 2000), turn=st.floats(0.2, 0.7), slope=st.floats(0.2, 2.0), noise=st.floats(0.0, 0.05),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_overfitting_is_found_with_the_step_where_validation_turned(
    steps: int, turn: float, slope: float, noise: float, seed: int
) -> None:
    losses, start = curve(steps, 0.5, 0.8), int(turn * steps)
    evals = losses + 0.1
    evals[start:] = evals[start] + slope * np.arange(steps - start) / steps
    found = verdicts(rows_of(losses, noise=noise, seed=seed, evals=evals))
    assert found["run_overfitting"].passed is False
    details = found["run_overfitting"].details
    assert details is not None
    assert abs(details["best_step"] - start) <= steps // 10
    assert found["run_divergence"].passed


def test_a_run_that_was_thrown_far_above_guessing_has_diverged_though_it_falls() -> None:
    """A rate of a thousand times too much: the highest losses are in the first steps, and all later ones look like learning."""
    losses = np.concatenate([[math.log(VOCABULARY)], np.linspace(800, 100, 199)])
    found = verdicts(rows_of(losses, noise=5.0))
    assert found["run_divergence"].passed is False
    assert found["run_plateau"].passed is None
    for name in ("run_progress", "run_divergence"):
        assert found[name].culprit == "diverged"
        assert "lower --learning-rate" in found[name].advice


def test_a_run_that_diverges_is_not_called_overfitting() -> None:
    losses = curve(1000, 2.0, 0.6)
    losses[600:] += np.linspace(0, 2, 400)
    found = verdicts(rows_of(losses))
    assert found["run_divergence"].passed is False
    assert found["run_overfitting"].passed


def spiky(at: list[int], *, lasting: bool = False) -> list[dict[str, Any]]:
    losses, norms = curve(1000, 2.0, 0.6), np.full(1000, 0.4)
    for step in at:
        losses[step : step + 3] += 2.0
        norms[step : step + 3] = 8.0
        if lasting:
            losses[step + 3 : step + 40] += 0.5
    return rows_of(losses, every=1, norms=norms * np.exp(np.random.default_rng(1).normal(0, 0.1, 1000)))


def test_one_spike_is_told_and_many_are_a_fault() -> None:
    one = verdicts(spiky([500]))["run_spikes"]
    assert one.passed
    assert "1 spike, at step 501" in one.measured
    many = verdicts(spiky([300, 400, 500, 600, 700]))["run_spikes"]
    assert many.passed is False
    assert many.culprit == "spikes"
    lasting = verdicts(spiky([500], lasting=True))["run_spikes"]
    assert lasting.passed is False
    assert "did not come back" in lasting.measured


def test_spikes_that_the_run_found_itself_are_taken() -> None:
    rows = rows_of(curve(500, 2.0, 0.6))
    for row in rows[10:40:6]:
        row["spike"] = {"threshold": 1.2}
    assert verdicts(rows)["run_spikes"].passed is False


def test_skipped_steps_and_a_loss_scale_that_sinks() -> None:
    rows = rows_of(curve(500, 2.0, 0.6))
    rows[-2]["skipped_steps"] = 3
    assert verdicts(rows)["run_skipped_steps"].passed
    rows[-2]["skipped_steps"] = 40
    assert verdicts(rows)["run_skipped_steps"].passed is False
    rows[-2] |= {"skipped_steps": 15, "loss_scale": 1024.0}
    assert verdicts(rows)["run_skipped_steps"].passed
    rows[-2]["loss_scale"] = 0.25
    assert "bf16" in verdicts(rows)["run_skipped_steps"].advice


@pytest.mark.parametrize(
    ("norm", "culprit"), [(50.0, "exploding_gradients"), (1e-8, "vanishing_gradients"), (0.5, ""), (3.0, "")]
)
def test_gradients_that_explode_or_vanish(norm: float, culprit: str) -> None:
    check = verdicts(rows_of(curve(500, 2.0, 0.6), norms=np.full(500, norm)))["run_gradient_norm"]
    assert check.culprit == culprit
    assert check.passed is (not culprit)


def test_a_run_that_learned_nothing_is_told() -> None:
    rows = rows_of(np.full(300, math.log(VOCABULARY)))
    assert "run_progress" in alarms(rows)
    assert verdicts(rows[:6])["run_progress"].passed is None


def test_a_run_whose_validation_was_never_better_than_at_first_learned_nothing() -> None:
    rows = rows_of(curve(400, 1.0, 1.0), evals=np.linspace(6.5, 9, 400))
    found = verdicts(rows)
    assert found["run_progress"].passed is False
    assert found["run_progress"].culprit == "not_learning"
    assert "validation was best at step 0" in found["run_progress"].measured
    assert found["run_overfitting"].passed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, -1.0, 1.7e308, -1.7e308, 1e-320, 10**400, "x", None], ids=str)
def test_whatever_stands_in_the_rows_what_is_said_is_json(value: Any) -> None:
    rows = rows_of(curve(400, 1.0, 1.0))
    for odd in (
        [{key: item if key == "step" else value for key, item in row.items()} for row in rows],
        [{**row, **({"loss": value} if number % 3 and "loss" in row else {})} for number, row in enumerate(rows)],
        [*rows, {"step": 401, **dict.fromkeys(rows[1].keys() - {"step"}, value)}, {"step": 402, "eval_loss": value}],
    ):
        checks = [*examine_run(odd, FACTS), reference_check(odd, Standing(TINY_SHAKESPEARE, 2, 64, 256))]
        said = json.loads(json.dumps([check.as_json() for check in checks], allow_nan=False))
        assert [check["name"] for check in said] == [check.name for check in checks]
        assert said[-1]["name"] == "run_reference"


def test_throughput_far_under_the_peak_and_a_run_that_slows_down() -> None:
    rows = rows_of(curve(500, 2.0, 0.6))
    wide = RunFacts(VOCABULARY, n_embd=768, max_grad_norm=1.0)
    assert alarms(rows, wide) == []
    for row in rows:
        row["mfu"] = 0.001
    assert alarms(rows, wide) == ["run_throughput"]
    assert alarms(rows, RunFacts(VOCABULARY, n_embd=64, max_grad_norm=1.0)) == []
    rows = rows_of(curve(500, 2.0, 0.6))
    for row in rows[-12:]:
        row["tokens_per_second"] = 900.0
    assert verdicts(rows)["run_throughput"].culprit == "slower_than_before"


def test_a_starved_loader() -> None:
    assert loader_check(1e6, 1e4).passed
    starved = loader_check(9e3, 1e4)
    assert starved.passed is False
    assert starved.culprit == "starved_loader"


def test_rows_that_say_little_give_no_verdict_and_no_error() -> None:
    assert [check.passed for check in examine_run([], FACTS)] == [None]
    few = verdicts(rows_of(curve(100, 2.0, 0.6))[:4])
    assert tuple(few) == NAMES
    assert not [check for check in few.values() if check.passed is False]
    odd: list[dict[str, Any]] = [{"step": 1, "loss": "x", "grad_norm": None}, {"step": 2, "loss": True, "spike": None}]
    assert tuple(verdicts(odd)) == NAMES


STANDING = Standing(TINY_SHAKESPEARE, 4, 128, 257, baseline_bits_per_byte=4.77)


def evaluated(tokens: int, nats: float, step: int = 500) -> list[dict[str, Any]]:
    return [{"step": step, "eval_loss": nats, "eval_bits_per_byte": nats / math.log(2), "num_input_tokens_seen": tokens}]


@pytest.mark.parametrize("row", [json.loads(line) for line in HISTORY.read_text(encoding="utf-8").splitlines()])
def test_the_measured_settings_stand_where_they_should(row: dict[str, Any]) -> None:
    """Those that were known to be bad are found, by the last of their losses; no other."""
    bad = ("norm none", "post-norm", "decay coupled 0.1", "sgd", "init he", "schedule constant", "rate 8e-3")
    tokens, _, loss = row["curve"][-1]
    check = reference_check(evaluated(tokens, loss), STANDING)
    assert check.passed is not None
    if loss > 2.017 + references.ROOM:
        assert check.passed is False
        assert row["name"].startswith(bad)
    else:
        assert check.passed
    assert "settings.jsonl" in check.expected or "nanoGPT" in check.expected


def test_a_reference_is_chosen_by_size_and_tokens_and_says_where_it_is_from() -> None:
    laptop = reference_check(evaluated(1_600_000, 1.90), STANDING)
    assert laptop.passed
    assert "github.com/karpathy/nanoGPT" in laptop.expected
    large = Standing(TINY_SHAKESPEARE, 6, 384, 65)
    assert reference_check(evaluated(82_000_000, 1.50), large).passed
    assert reference_check(evaluated(82_000_000, 1.80), large).passed is False
    assert reference_check(evaluated(10_000, 3.0), STANDING).passed is None  # too early
    assert reference_check(evaluated(1_000_000, 3.0), Standing(TINY_SHAKESPEARE, 1, 16, 257)).passed is None  # too small


def test_a_loss_that_is_too_good_is_a_leak() -> None:
    check = reference_check(evaluated(1_600_000, 0.05), STANDING)
    assert check.passed is False
    assert check.culprit == "leak"


def test_other_text_has_no_reference_but_a_rough_law_in_its_range() -> None:
    unknown = Standing("", 4, 128, 8192)
    assert reference_check(evaluated(10**6, 5.0), unknown).passed is None
    gpt2 = Standing("", 12, 768, 50257)
    found = reference_check(evaluated(10**10, 3.2), gpt2)
    assert found.passed
    assert "not for yours" in found.expected
    assert "2.85" in found.expected
    assert reference_check(evaluated(10**10, 7.0), gpt2).passed is False
    # 3.4 nats for 85 million weights and ten billion tokens, the paper's equation 10 by hand.
    assert law_loss(85e6, 1e10) == pytest.approx(1.69 + 406.4 / 85e6**0.34 + 410.7 / 1e10**0.28)
    assert 3.0 < law_loss(85e6, 1e10) < 3.6


def test_a_run_must_know_more_than_how_often_bytes_occur() -> None:
    assert baseline_check(evaluated(10**6, 2.0), STANDING).passed
    assert baseline_check(evaluated(10**6, 3.346), STANDING).passed is False  # norms behind, as it was measured
    assert baseline_check(evaluated(10**4, 5.0, step=20), STANDING).passed is None
    assert baseline_check([], STANDING).passed is None


def test_references_have_a_source_and_curves_that_fall() -> None:
    for reference in REFERENCES:
        assert reference.source
        tokens, losses = zip(*reference.curve, strict=True)
        assert list(tokens) == sorted(tokens)
        assert list(losses) == sorted(losses, reverse=True)
