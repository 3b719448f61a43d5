"""
What a run does about a spike, and about numbers that are not finite.

A batch is made bad by its content, wherever it is read: the hidden states of its forward pass are enlarged, so that loss and
gradient jump as they do for a passage of garbage, which another test here plants into a real text.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import groundup
from groundup.checkpoint.commit import checkpoints, step_of, verify
from groundup.cli.main import run as command
from groundup.data.batches import Batch
from groundup.errors import CheckpointError, DivergedError
from groundup.recipes.record import add_left_out, read_left_out
from groundup.tracking.metrics import read_rows
from groundup.training.step import Learner, Update, train_step
from tests.conftest import TINY, flags, make_text
from tests.runs import Killed, assert_same_end, contents, last_state, prepared

pytestmark = pytest.mark.usefixtures("quick")

# 39 steps of 8 windows are an epoch; a spike needs 20 steps before it.
RUN = TINY | {
    "max_steps": 32, "eval_steps": 0, "save_steps": 6, "sample_tokens": 0, "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2, "save_total_limit": 0,
}  # fmt: skip
WINDOWS = 8
ROLLBACK = RUN | {"spike_action": "rollback"}
Wrong = Callable[[Learner, Batch, int, float], Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory, words=1200)


@pytest.fixture(scope="module")
def windows(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What the run reads, window by window in its order, (N, T)."""
    with groundup.open_training(data, tmp_path_factory.mktemp("order") / "run", **RUN) as training:
        return torch.from_numpy(training.course.samples.read(np.arange(400, dtype=np.int64)))[:, :-1]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wrong], None]:
    """Have the steps of all following runs pass through a context that may change them: (learner, batch, step, loss scale)."""

    def choose(wrong: Wrong) -> None:
        def step_gone_wrong(learner: Learner, batch: Batch, *arguments: Any, **options: Any) -> Update:
            with wrong(learner, batch, options["step"], options["loss_scale"]) as changed:
                return train_step(changed or learner, batch, *arguments, **options)

        monkeypatch.setattr("groundup.training.loop.train_step", step_gone_wrong)

    return choose


@pytest.fixture
def bad(steps, windows) -> Callable[..., None]:
    """Make the batches bad that begin at these positions."""

    def choose(*positions: int) -> None:
        @contextmanager
        def enlarged(learner: Learner, batch: Batch, step: int, scale: float) -> Iterator[Learner]:
            is_bad = any(torch.equal(batch.input_ids[0], windows[position]) for position in positions)
            yield replace(learner, forward=lambda ids: learner.forward(ids) * -100) if is_bad else learner

        steps(enlarged)

    return choose


def batch(step: int) -> int:
    """The position at which the batch of a step begins, where nothing is left out."""
    return WINDOWS * (step - 1)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "metrics.jsonl")


def moments(learner: Learner) -> dict[str, Tensor]:
    found = {}
    for name, parameter in learner.model.named_parameters():
        found[name] = parameter.detach().clone()
        found |= {f"{name}/{slot}": value.clone() for slot, value in learner.optimizers.state_of(parameter).items()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_a_bad_batch_nothing_is_said(data, tmp_path, bad, capsys):
    """Or the tests below would say little."""
    bad()
    summary = groundup.train(data, tmp_path / "run", **ROLLBACK)
    assert (summary["steps"], summary["skipped_steps"]) == (32, 0)
    assert "SPIKE" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "spikes").exists()
    assert not (tmp_path / "run" / "left_out.jsonl").exists()


@pytest.mark.parametrize("action", ["report", "skip"])
def test_report_learns_from_it_and_skip_does_not(data, tmp_path, steps, windows, action, capsys):
    changed = {}

    @contextmanager
    def watched(learner: Learner, batch_: Batch, step: int, scale: float) -> Iterator[Learner]:
        is_bad = torch.equal(batch_.input_ids[0], windows[batch(25)])
        before = moments(learner)
        yield replace(learner, forward=lambda ids: learner.forward(ids) * -100) if is_bad else learner
        changed[step] = not same(moments(learner), before)

    steps(watched)
    run = tmp_path / "run"
    summary = groundup.train(data, run, **RUN | {"spike_action": action, "logging_steps": 100})
    skipped = action == "skip"
    assert (summary["steps"], summary["skipped_steps"]) == (32, int(skipped))
    assert [step for step in changed if not changed[step]] == ([25] if skipped else []), "weights and moments, bit for bit"
    said = capsys.readouterr().err
    path = run / "spikes" / "step-000025.txt"
    assert f"step 25: SPIKE: loss " in said  # noqa: F541
    what = "not learned from" if skipped else "learned from"
    assert f"the batch is {what}, and saved as text in {path}" in said
    assert f"done about it: {what}" in path.read_text()
    row = next(row for row in rows_of(run) if row["step"] == 25)  # logged, though it is no logging step
    assert row["spike"]["loss"]["score"] > 8
    assert row["spike"]["loss"]["value"] == row["loss"]
    assert row.get("skipped_steps", 0) == int(skipped)
    assert f"batch_digest {row['batch_digest']}" in path.read_text()
    assert not (run / "left_out.jsonl").exists()


def test_too_many_spikes_in_a_row_that_are_skipped_stop_the_run(data, tmp_path, bad):
    """A loss that stays at another level is no spike for ever."""
    bad(*map(batch, range(25, 33)))
    with pytest.raises(DivergedError, match="diverged: 4 steps in a row up to step 28 .* far above those before"):
        groundup.train(data, tmp_path / "run", **RUN | {"spike_action": "skip", "max_skipped_steps": 4})
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [6, 12, 18, 24]


KINDS = {
    "as it is": {},
    "before the first checkpoint": {"save_steps": 100},
    "averaged": {"ema_decay": 0.9},
    "dropout, two passes": {"resid_pdrop": 0.1, "per_device_train_batch_size": 4},
    "evaluated": {"eval_steps": 6, "load_best_model_at_end": True},
}


@pytest.mark.parametrize(
    "name", ["as it is", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "as it is")]
)
def test_going_back_is_as_if_the_batch_had_never_been_there(data, tmp_path, bad, monkeypatch, name, capsys):
    """Two of them, the second one only met after the first is left out; against a run that left both out from its start."""
    options, run, straight = ROLLBACK | KINDS[name], tmp_path / "run", tmp_path / "straight"
    bad(batch(23), batch(28))
    summary = groundup.train(data, run, **options)
    assert (summary["steps"], summary["skipped_steps"]) == (32, 0)
    assert summary["num_input_tokens_seen"] == 32 * 128, "what was left out is not counted"
    found = read_left_out(run)
    assert [(row["step"], row["first_sample"], row["samples"]) for row in found] == [(23, batch(23), 8), (27, batch(28), 8)]
    said = capsys.readouterr().err
    assert said.count("going back to the last checkpoint, to go on without these 8 windows") == 2

    bad()
    given = [{"first_sample": batch(step), "samples": 8} for step in (23, 28)]
    monkeypatch.setattr("groundup.recipes.training.own_left_out", lambda run, identity: given)
    groundup.train(data, straight, **options)
    assert_same_end(run, straight)
    assert last_state(run) == last_state(straight)
    assert json.loads((checkpoints(run)[-1] / "trainer_state.json").read_text())["state"]["samples_seen"] == 34 * 8


def test_going_back_while_the_batch_grows(data, tmp_path, steps, windows, monkeypatch):
    """Batches lie otherwise then, also where they are read after the one that was left out."""
    options = ROLLBACK | {"total_batch_tokens": "64:128@20"}
    bad_at = 170

    @contextmanager
    def enlarged(learner: Learner, batch_: Batch, step: int, scale: float) -> Iterator[Learner]:
        is_bad = bool((batch_.input_ids == windows[bad_at]).all(1).any())
        yield replace(learner, forward=lambda ids: learner.forward(ids) * -100) if is_bad else learner

    steps(enlarged)
    groundup.train(data, tmp_path / "run", **options)
    found = read_left_out(tmp_path / "run")
    assert len(found) == 1
    assert found[0]["first_sample"] <= bad_at < found[0]["first_sample"] + found[0]["samples"]
    monkeypatch.setattr("groundup.recipes.training.own_left_out", lambda run, identity: found)
    groundup.train(data, tmp_path / "straight", **options)
    assert_same_end(tmp_path / "run", tmp_path / "straight")


def test_what_was_left_out_is_written_down(data, tmp_path, bad):
    bad(batch(26), batch(32))
    run = tmp_path / "run"
    groundup.train(data, run, **ROLLBACK)
    lines = [json.loads(line) for line in (run / "left_out.jsonl").read_text().splitlines()]
    # Without the first, everything after it is one step earlier: the last step reads what would have been the 33rd's.
    assert [(row["step"], row["first_sample"]) for row in lines] == [(26, batch(26)), (31, batch(32))]
    assert all(row.keys() == {"step", "first_sample", "samples", "loss", "grad_norm", "identity"} for row in lines)
    assert all(row["loss"] > 10 and row["grad_norm"] > 1 for row in lines)
    files = sorted(path.name for path in (run / "spikes").iterdir())
    assert files == ["step-000026.txt", "step-000031.txt"]
    assert "done about it: left out" in (run / "spikes" / files[0]).read_text()
    # What is logged is what was learned from.
    logged = rows_of(run)
    assert [row["step"] for row in logged] == list(range(1, 33))
    assert not any("spike" in row for row in logged)


def test_the_same_step_twice_in_a_row(data, tmp_path, bad):
    """The batch that takes the place of the bad one is bad too."""
    bad(batch(26), batch(27))
    run = tmp_path / "run"
    assert groundup.train(data, run, **ROLLBACK)["steps"] == 32
    assert [row["step"] for row in read_left_out(run)] == [26, 26]
    assert {path.name for path in (run / "spikes").iterdir()} == {"step-000026.txt", "step-000026-2.txt"}


def test_the_last_step_may_be_a_spike(data, tmp_path, bad):
    bad(batch(32))
    summary = groundup.train(data, tmp_path / "run", **ROLLBACK)
    assert summary["steps"] == 32
    assert [row["first_sample"] for row in read_left_out(tmp_path / "run")] == [batch(32)]
    assert rows_of(tmp_path / "run")[-1]["loss"] < 6


@pytest.mark.parametrize("moment", ["before it is written down", "after it is written down"])
def test_killed_while_going_back_it_ends_the_same(data, tmp_path, bad, monkeypatch, moment):
    bad(batch(23), batch(27))
    run, straight = tmp_path / "run", tmp_path / "straight"
    groundup.train(data, straight, **ROLLBACK)

    def killing(run: Path, identity: dict[str, Any], row: dict[str, Any]) -> None:
        if moment.startswith("after"):
            add_left_out(run, identity, row)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("groundup.recipes.train.add_left_out", killing)
        with pytest.raises(Killed):
            groundup.train(data, run, **ROLLBACK)
    assert len(read_left_out(run)) == (1 if moment.startswith("after") else 0)
    groundup.train(data, run, **ROLLBACK)
    assert_same_end(run, straight)
    for name in ("left_out.jsonl", "spikes/step-000023.txt"):
        assert (run / name).read_text().replace("run", "") == (straight / name).read_text().replace("straight", "")
    assert sorted(path.name for path in (run / "spikes").iterdir()) == sorted(p.name for p in (straight / "spikes").iterdir())


def test_a_run_that_goes_back_too_often_ends_with_code_5(data, tmp_path, bad, capsys):
    bad(*map(batch, range(26, 40)))
    run = tmp_path / "run"
    arguments = ["train", str(data), "--output-dir", str(run), *flags(ROLLBACK | {"max_rollbacks": 2})]
    assert command(arguments) == 5
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]
    assert len(lines) == 1
    assert "diverged: a spike at step 26" in lines[0]
    assert "after going back 2 times (max_rollbacks)" in lines[0]
    assert len(read_left_out(run)) == 2
    assert [step_of(path) for path in checkpoints(run)] == [6, 12, 18, 24]
    for path in checkpoints(run):
        verify(path)
    before = contents(run)
    assert command(arguments) == 5, "the same again"
    assert {name: found for name, found in contents(run).items() if "checkpoint" in name} == {
        name: found for name, found in before.items() if "checkpoint" in name
    }
    bad()
    assert command(arguments) == 0, "it can go on from there"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "3", '{"first_sample": 8}', '{"first_sample": 8, "samples": "x"}', '{"first_sample": 8, "samples": null}',
     '{"first_sample": 1e999, "samples": 8}', '{"first_sample": -8, "samples": 8}', '{"first_sample": 8, "samples": 0}',
     '{"first_sample": 8.5, "samples": 8}', '{"first_sample": 8, "samples": 8}\n{"first_sam', "\x00", "[" * 100_000, ""],
)  # fmt: skip
def test_a_damaged_record_of_what_was_left_out_is_one_line(data, tmp_path, content, capsys):
    """Without it the run would learn other data, so it does not go on."""
    run = tmp_path / "run"
    groundup.train(data, run, **RUN | {"max_steps": 1})
    (run / "left_out.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=r"left_out.jsonl, which says what data was left out, is damaged .*; restore it"):
        groundup.train(data, run, **RUN)
    capsys.readouterr()
    assert command(["train", str(data), "--output-dir", str(run), *flags(RUN)]) == 4
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]) == 1


def test_bytes_that_are_no_text_are_damage_too(data, tmp_path):
    run = tmp_path / "run"
    groundup.train(data, run, **RUN | {"max_steps": 1})
    (run / "left_out.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="left_out.jsonl"):
        groundup.train(data, run, **RUN)


@pytest.mark.slow
def test_a_passage_of_garbage_in_a_real_text(tmp_path, capsys):
    """Its batches are met one by one, left out, and can be read in the files that the run names."""
    draw = random.Random(1)
    garbage = "".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(40))
    (tmp_path / "text.txt").write_text("ab" * 2500 + garbage + "ab" * 2500, encoding="utf-8")
    run = tmp_path / "run"
    options = ROLLBACK | {"max_steps": 75, "save_steps": 10, "learning_rate": 2e-2, "spike_window": 20}
    groundup.train(tmp_path / "text.txt", run, **options)
    said, found = capsys.readouterr().err, read_left_out(run)
    with groundup.open_training(tmp_path / "text.txt", run, **options) as training:
        read = training.course.samples.read(np.arange(75 * WINDOWS + sum(row["samples"] for row in found)))
    strange = [position for position in range(len(read)) if not np.isin(read[position], list(b"ab")).all()]
    first = found[0]["first_sample"]
    assert len([position for position in strange if position >= first]) >= 3, "or the test would say little"
    assert len(found) < 10
    for position in range(first, len(read)):
        is_left_out = any(row["first_sample"] <= position < row["first_sample"] + row["samples"] for row in found)
        assert is_left_out or position not in strange
    for row in found:
        assert any(row["first_sample"] <= position < row["first_sample"] + row["samples"] for position in strange)
        path = run / "spikes" / f"step-{row['step']:06}.txt"
        assert str(path) in said
        worst = path.read_text(encoding="utf-8").split("--- window")[1]
        assert any(character in worst for character in garbage), worst
    assert rows_of(run)[-1]["loss"] < 0.01


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_changes_nothing_and_is_told(data, tmp_path, steps, value, capsys):
    """Of one element of one parameter; the loss is good, and the step before and after, too."""
    changed = {}

    @contextmanager
    def poisoned(learner: Learner, batch_: Batch, step: int, scale: float) -> Iterator[None]:
        bias = learner.model.h[1].mlp.c_fc.bias
        mask = torch.zeros_like(bias).index_fill(0, torch.tensor([3]), value)
        hook = bias.register_hook(lambda gradient: gradient + mask) if step in (4, 5, 9) else None
        before = moments(learner)
        yield
        changed[step] = not same(moments(learner), before)
        if hook:
            hook.remove()

    steps(poisoned)
    run = tmp_path / "run"
    options = RUN | {"max_steps": 12, "logging_steps": 100, "ema_decay": 0.9, "health_steps": 1, "spike_action": "rollback"}
    summary = groundup.train(data, run, **options)
    assert [step for step in changed if not changed[step]] == [4, 5, 9]
    assert (summary["steps"], summary["skipped_steps"]) == (12, 3)
    said = capsys.readouterr().err
    assert [f"step {step}: SKIPPED: loss" in said for step in (3, 4, 5, 6, 9)] == [False, True, True, False, True]
    assert "nothing was updated (3 skipped so far)" in said
    rows = {row["step"]: row for row in rows_of(run)}
    assert [step for step in rows if rows[step]["grad_norm"] is None] == [4, 5, 9]
    assert all(rows[step]["loss"] is not None for step in (4, 5, 9))
    assert [rows[step].get("skipped_steps", 0) for step in (3, 4, 5, 9, 12)] == [0, 1, 2, 3, 3]
    assert not any("health" in rows[step] for step in (4, 5, 9)), "of a step that was not made there is nothing to measure"
    assert not (run / "left_out.jsonl").exists(), "it is no matter of degree, so nobody goes back"


def test_too_many_gradients_in_a_row_that_are_no_numbers_end_with_code_5(data, tmp_path, steps, capsys):
    @contextmanager
    def poisoned(learner: Learner, batch_: Batch, step: int, scale: float) -> Iterator[None]:
        hook = learner.model.ln_f.bias.register_hook(lambda gradient: gradient * math.nan)
        yield
        hook.remove()

    arguments = ["train", str(data), "--output-dir", str(tmp_path / "run")]
    assert command([*arguments, *flags(RUN | {"max_steps": 6})]) == 0
    steps(poisoned)
    assert command([*arguments, *flags(RUN | {"max_skipped_steps": 3})]) == 5
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]
    assert len(lines) == 1
    assert "diverged: 3 steps in a row up to step 9" in lines[0]
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [6]
    verify(tmp_path / "run" / "checkpoint-6")


HALF = RUN | {"max_steps": 24, "fp16": True, "max_skipped_steps": 3}


@contextmanager
def overflowing(learner: Learner, batch_: Batch, step: int, scale: float, *, above: float) -> Iterator[None]:
    """A gradient as float16 would have it where the loss scale is too large."""
    hook = learner.model.ln_f.bias.register_hook(lambda gradient: gradient + (math.inf if scale > above else 0))
    yield
    hook.remove()


def test_an_overflow_lowers_the_loss_scale_and_the_run_recovers(data, tmp_path, steps, capsys):
    """Eight in a row, though three would be a divergence: while the scale can fall they say nothing of the model."""
    steps(lambda *step: overflowing(*step, above=2.0**8))
    run = tmp_path / "run"
    summary = groundup.train(data, run, **HALF)
    assert (summary["steps"], summary["skipped_steps"]) == (24, 8)
    rows = rows_of(run)
    assert [row["loss_scale"] for row in rows] == [2.0**15, 2.0**14, 2.0**13, 2.0**12, 2.0**11, 2.0**10, 2.0**9, *[2.0**8] * 17]
    assert [row["grad_norm"] is None for row in rows] == [True] * 8 + [False] * 16
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert capsys.readouterr().err.count("SKIPPED") == 8
    # Stopped in the middle of it, it goes on as if it had not been.
    for steps_ in (5, 11, 24):
        groundup.train(data, tmp_path / "parts", **HALF | {"max_steps": steps_})
    assert_same_end(tmp_path / "parts", run)


def test_an_overflow_that_no_loss_scale_cures_is_a_divergence(data, tmp_path, steps):
    """From 2^16 down to 1 it is excused; then as many steps as without float16."""
    steps(lambda *step: overflowing(*step, above=0))
    with pytest.raises(DivergedError, match="3 steps in a row up to step 19"):
        groundup.train(data, tmp_path / "run", **HALF)


def test_a_run_that_starts_anew_otherwise_leaves_nothing_out(data, tmp_path, bad):
    """Before the first checkpoint another seed is another order of the data: the positions mean something else."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    late = ROLLBACK | {"save_steps": 500, "max_rollbacks": 1}
    bad(*(batch(step) for step in range(26, 33)))
    with pytest.raises(DivergedError):
        groundup.train(data, run, **late)
    assert read_left_out(run)
    bad()
    groundup.train(data, run, **late | {"seed": 7})
    groundup.train(data, fresh, **late | {"seed": 7})
    assert_same_end(run, fresh)


def test_going_back_needs_the_source_no_more(tmp_path, bad, monkeypatch):
    """Standard input is read once, and a file may be edited meanwhile: the data is in hand."""
    text = tmp_path / "text.txt"
    text.write_text(make_text(1200), encoding="utf-8")
    bad(batch(26))

    def gone(*arguments: Any) -> None:
        text.unlink()
        add_left_out(*arguments)

    monkeypatch.setattr("groundup.recipes.train.add_left_out", gone)
    assert groundup.train(text, tmp_path / "run", **ROLLBACK)["steps"] == 32
