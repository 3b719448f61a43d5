"""What curves of losses say."""

import math

import numpy as np
import pytest

from groundup.evaluation.curves import Turn, never_better, noise, risen, turned

STEPS = np.arange(1.0, 101)
FALLING = np.linspace(4, 1, 100)


def verdict(evaluations: list[tuple[float, float]], losses=FALLING) -> Turn | None:
    return turned(*np.array(evaluations, dtype=float).reshape(-1, 2).T, STEPS, losses)


def test_learning_by_heart_begins_where_validation_turns():
    evaluations = [(20, 3.0), (40, 2.5), (60, 2.6), (80, 2.7), (100, 2.9)]
    assert verdict(evaluations) == Turn(40, 2.5, 2.9)
    # A training loss that stands still has nothing more to learn by heart; one that rose as well is another illness.
    assert verdict(evaluations, np.linspace(4, 1, 100).clip(2)) == Turn(40, 2.5, 2.9)
    assert verdict(evaluations, np.linspace(1, 4, 100)) is None


@pytest.mark.parametrize(
    "evaluations",
    [
        [],
        [(20, 3.0), (40, 2.9)],
        [(20, 3.0), (40, 2.5), (60, 2.505), (80, 2.51)],  # a rise of 0.4 %
        [(20, 3.0), (40, 2.5), (60, 2.55)],  # 2 %, seen once
        [(20, 3.0), (40, 2.5), (60, 2.9), (80, 2.4), (100, 2.3)],  # lower again
        [(0, 2.0), (20, 3.0), (40, 2.5), (60, 2.4), (80, 2.4)],  # never better than at the start
    ],
)
def test_what_is_no_turn(evaluations):
    assert verdict(evaluations) is None


def test_a_jump_is_seen_at_once():
    assert verdict([(20, 3.0), (40, 2.5), (60, 2.6)]) == Turn(40, 2.5, 2.6)


def test_noise_is_not_trend():
    draw = np.random.default_rng(0)
    assert noise(FALLING) == pytest.approx(0, abs=1e-9)
    assert noise(FALLING + 0.1 * draw.standard_normal(100)) == pytest.approx(0.1, rel=0.3)
    assert noise(np.array([1.0, 2.0])) == 0


def test_shares_of_nothing_are_finite():
    assert risen(np.zeros(5)) == 0
    assert 0 < risen(np.array([1.0, 0.0, 2.0])) < math.inf
    assert risen(np.array([3.0, 2.0, 2.5])) == pytest.approx(0.25)
    assert verdict([(20, 0.0), (40, 0.0), (60, 0.0)]) is None


def test_a_run_whose_first_evaluation_was_its_best_learned_nothing():
    assert never_better(np.array([5.5, 5.6, 5.9]))
    assert not never_better(np.array([5.5, 5.6]))
    assert not never_better(np.array([5.5, 5.6, 5.51])), "within the noise"
    assert not never_better(np.array([5.5, 5.4, 5.9]))
    assert not never_better(np.zeros(4))
