"""Quantities that grow over a run: the global batch and the length of the sequences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.config.load import Given, resolve
from groundup.config.options import TRAIN_GROUPS, BatchOptions, ModelOptions, RunOptions, ScheduleOptions
from groundup.config.plan import Plan, plan_run
from groundup.config.ramp import Ramp
from groundup.errors import ConfigError
from groundup.training.loop import position_ranges


def settings(**options):
    return resolve(TRAIN_GROUPS, {name: Given(value, f"--{name}") for name, value in options.items()})


def plan(windows=1000, **options) -> Plan:
    options = {"n_positions": 16, "total_batch_tokens": 160, "warmup_steps": 0} | options
    found = settings(**options)
    groups = (found[group] for group in (ModelOptions, BatchOptions, ScheduleOptions, RunOptions))
    return plan_run(*groups, windows=windows)


def test_a_ramp_goes_evenly_from_its_start_to_its_end():
    ramp = Ramp("10:50@0.5")
    assert [ramp.value_at(step, 8) for step in range(1, 9)] == [10, 20, 30, 40, 50, 50, 50, 50]
    assert [Ramp("50:10@4").value_at(step, 1000) for step in (1, 3, 5, 999)] == [50, 30, 10, 10]


@pytest.mark.parametrize("text", ["4096:16384@0.25", "4_096:2^14@.25", " 4096 : 16384 @ 0.250"])
def test_a_ramp_is_its_own_spelling_whoever_wrote_it(text):
    ramp = settings(total_batch_tokens=text)[BatchOptions].total_batch_tokens
    assert ramp == str(Ramp(ramp)) == "4096:16384@0.25"
    assert (ramp.start, ramp.end, ramp.length) == (4096, 16384, 0.25)


@pytest.mark.parametrize(
    "text",
    [
        "1:2",
        "1@2",
        "a:b@c",
        "1:2@0",
        "1:2@-1",
        "1:2@nan",
        "1:2@inf",
        ":2@1",
        "1:@1",
        "1:2:3@1",
        "1.5:2@1",
        "0^-1:5@1",
        "2^64:5@1",
    ],
)
def test_another_spelling_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"total_batch_tokens: .* (32768:524288@0.2|length above 0)"):
        settings(total_batch_tokens=text)


@pytest.mark.parametrize("text", ["0:4096@0.5", "4096:-1@0.5", "8:4096@0.5"])
def test_both_ends_of_a_ramp_are_held_to_the_bounds(text):
    with pytest.raises(ConfigError, match="must be at least 1 tokens|less than one window"):
        settings(total_batch_tokens=text)


def test_the_global_batch_grows_in_whole_windows():
    made = plan(total_batch_tokens="32:160@0.5", max_steps=8)
    assert [made.windows_at(step) for step in range(1, 9)] == [2, 4, 6, 8, 10, 10, 10, 10]
    assert made.total_windows == 60
    assert made.micro_batches_at(1) == ((0, 2),)
    assert made.micro_batches_at(8) == ((0, 8), (8, 2))
    assert made.tokens_per_step == 160


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(1, 3000))
def test_epochs_are_read_in_the_fewest_steps_of_a_growing_batch(start, end, length, windows):
    made = plan(windows, total_batch_tokens=f"{start * 16}:{end * 16}@{length}", num_train_epochs=1.0)
    read = [sum(made.windows_at(step) for step in range(1, made.total_steps + 1))]
    assert made.total_windows == read[0] >= windows
    # One step less would not do; the ramp of a shorter run is shorter, which moves the sum by a window or two.
    assert read[0] - windows <= max(start, end) + 2


def test_the_length_of_a_run_in_tokens():
    assert plan(max_train_tokens=1601).total_steps == 11
    assert plan(max_train_tokens=1600).total_steps == 10
    assert plan(max_steps=7, num_train_epochs=100).total_steps == 7


def test_steps_and_tokens_contradict_each_other():
    with pytest.raises(ConfigError, match="max_train_tokens: 5 .* both set the length"):
        settings(max_steps=3, max_train_tokens=5)


def test_sequences_grow_through_divisors_of_the_context():
    made = plan(sequence_length="4:16@6", max_steps=8)
    assert [made.sequence_length_at(step) for step in range(1, 9)] == [4, 4, 8, 8, 8, 8, 16, 16]
    assert plan().sequence_length_at(1) == 16
    assert plan(sequence_length=8).sequence_length_at(1) == 8


@pytest.mark.parametrize("text", ["3:16@0.5", "4:15@0.5", "5", "32"])
def test_a_sequence_that_does_not_divide_the_context_is_refused(text):
    with pytest.raises(ConfigError, match="sequence_length: .* does not divide n_positions 16"):
        settings(n_positions=16, sequence_length=text)


def test_positions_follow_each_other_as_the_batch_grows():
    made = plan(total_batch_tokens="32:160@0.5", max_steps=8)
    assert list(position_ranges(made, 0, 0)) == [(0, 2), (2, 4), (6, 6), (12, 8), (20, 10), (30, 10), (40, 10), (50, 10)]
    # A run that goes on does so from the position that it had reached.
    assert list(position_ranges(made, 3, 12)) == [(12, 8), (20, 10), (30, 10), (40, 10), (50, 10)]


def test_positions_that_are_left_out_are_passed_over():
    made = plan(max_steps=3)
    assert list(position_ranges(made, 0, 0, ((10, 10),))) == [(0, 10), (20, 10), (30, 10)]
    assert list(position_ranges(made, 0, 0, ((20, 10), (0, 10)))) == [(10, 10), (30, 10), (40, 10)]
    # Also where the batches lie otherwise.
    assert list(position_ranges(made, 0, 5, ((10, 10),))) == [(20, 10), (30, 10), (40, 10)]
    assert list(position_ranges(made, 2, 50, ((10, 10),))) == [(50, 10)]
