"""
A run that is killed, stopped or resumed ends where an uninterrupted one ends, bit for bit.

The oracle is one run that nothing disturbs: its last checkpoint and the rows that it logged.
"""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import groundup
from groundup.checkpoint.commit import checkpoints, step_of, verify
from groundup.errors import ConfigError, Stopped
from groundup.recipes import training as training_recipe
from groundup.tracking.metrics import append_row
from tests.conftest import TINY, flags, make_text
from tests.conftest import groundup as command
from tests.runs import assert_same_end, contents, end, last_state, ledger, logged_step, start, wait_until

pytestmark = pytest.mark.usefixtures("without_pictures")

# 10 steps are an epoch of this text, so every run here crosses epochs.
WORDS = 300
LONG = TINY | {"max_steps": 100, "eval_steps": 50, "save_steps": 10, "sample_tokens": 0, "warmup_steps": 5}
SHORT = TINY | {"eval_steps": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "text.txt"
    path.write_text(make_text(WORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """The uninterrupted run for a rate of dropout, made once."""
    made: dict[float, Path] = {}

    def run_with(dropout: float) -> Path:
        if dropout not in made:
            run = tmp_path_factory.mktemp("straight") / "run"
            done = command("train", text, "--output-dir", run, *flags(with_dropout(dropout)), "--json")
            assert done.code == 0, done.err
            assert done.json["steps"] == LONG["max_steps"]
            made[dropout] = run
        return made[dropout]

    return run_with


def with_dropout(rate: float) -> dict[str, Any]:
    # Two passes a step, so that each has masks of its own.
    passes = {"per_device_train_batch_size": 4} if rate else {}
    return LONG | passes | {"resid_pdrop": rate, "embd_pdrop": rate, "attn_pdrop": rate}


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_killed_at_random_moments(text, straight, tmp_path, dropout):
    run, options, draw = tmp_path / "run", with_dropout(dropout), random.Random(7)
    killed = 0
    for target in (5, 17, 41, 78):  # before the first checkpoint, then in other epochs
        process = start(text, run, options)
        if wait_until(process, lambda target=target: logged_step(run) >= target):
            time.sleep(draw.random() * 0.02)
            killed += end(process, signal.SIGKILL).code == -signal.SIGKILL
    assert killed >= 3
    done = end(start(text, run, options))
    assert done.code == 0, done.err
    assert "resuming from checkpoint-" in done.err
    assert_same_end(run, straight(dropout))


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(text, straight, tmp_path):
    """Without tools: watch for the staging directory, and kill while it is there."""
    run = tmp_path / "run"
    seen_staged = 0
    for after in (10, 40):
        process = start(text, run, LONG)
        staged = lambda after=after: logged_step(run) >= after and any(run.glob(".checkpoint-*.partial"))  # noqa: E731
        if wait_until(process, staged):
            end(process, signal.SIGKILL)
            seen_staged += any(run.glob(".checkpoint-*.partial"))
        for path in checkpoints(run):
            verify(path)  # whatever has a final name is whole
    assert seen_staged, "no kill fell into a checkpoint's writing"
    done = end(start(text, run, LONG))
    assert done.code == 0, done.err
    assert not list(run.glob(".checkpoint-*")), "leftovers stay"
    assert_same_end(run, straight(0.0))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_killed_at_every_kind_of_rename(text, straight, tmp_path):
    """
    Killed at the n-th rename, for growing n: of the dataset, the configuration, the metrics, a checkpoint's files, the
    checkpoint itself and the one that is pruned. Once a checkpoint is there, one that verifies is there for ever.
    """
    run, saved_one, deaths = tmp_path / "run", False, 0
    for n in itertools.chain((1, 2, 3, 5, 6), itertools.count(9, 28)):
        inject = f"inject=rename,renameat,renameat2:signal=KILL:when={n}"
        process = start(text, run, LONG, "strace", "-f", "-qq", "-o", "/dev/null",
                        "-e", "trace=rename,renameat,renameat2", "-e", inject)  # fmt: skip
        done = end(process)
        good = checkpoints(run)
        for path in good:
            verify(path)
        saved_one = saved_one or bool(good)
        assert good or not saved_one, f"no checkpoint is left after rename {n}"
        if done.code == 0:
            break
        assert done.code in (-signal.SIGKILL, 128 + signal.SIGKILL), done.err
        deaths += 1
    assert deaths >= 6
    assert_same_end(run, straight(0.0))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(text, straight, tmp_path, number):
    run = tmp_path / "run"
    process = start(text, run, LONG)
    assert wait_until(process, lambda: logged_step(run) >= 23)
    sent = time.monotonic()
    stopped = end(process, number)
    assert stopped.code == 75, stopped.err
    assert time.monotonic() - sent < 10
    assert stopped.out == ""
    assert number.name in stopped.err
    assert stopped.error_lines == [stopped.err.splitlines()[-1]], "one line says how it ended"
    assert step_of(checkpoints(run)[-1]) == logged_step(run) >= 23, "the step that was done is saved"
    done = end(start(text, run, LONG))
    assert done.code == 0, done.err
    assert_same_end(run, straight(0.0))


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(text, tmp_path):
    """The first signal waits for the step; the second does not. The step is made long, so that both fall into it."""
    run = tmp_path / "run"
    options = LONG | {"total_batch_tokens": 2**21, "eval_steps": 0}
    process = start(text, run, options)
    assert wait_until(process, lambda: (run / "config.toml").exists())
    time.sleep(1.0)  # inside the first step, which takes many seconds
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first signal must wait for the step"
    sent = time.monotonic()
    assert end(process, signal.SIGINT).code == 130
    assert time.monotonic() - sent < 2
    assert checkpoints(run) == []


@pytest.mark.slow
def test_a_second_run_in_the_directory_of_a_live_one_is_refused(text, tmp_path):
    run = tmp_path / "run"
    first = start(text, run, LONG | {"max_steps": 10**6, "save_steps": 0})
    try:
        assert wait_until(first, lambda: logged_step(run) >= 1)
        before = checkpoints(run)
        second = command("train", text, "--output-dir", run, *flags(LONG), "--json")
        assert second.code == 2
        assert f"pid {first.pid}" in second.err
        assert len(second.error_lines) == 1
        assert first.poll() is None, "the live run goes on"
        assert checkpoints(run) == before
    finally:
        end(first, signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that is complete; tests work on copies of it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    groundup.train(text, run, **SHORT)
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# Changed option → what the refusal must name.
CHANGES = [
    ({"n_layer": 1}, ["n_layer: 2 → 1"]),
    ({"n_embd": 32, "n_head": 4}, ["n_embd: 16 → 32", "n_head: 2 → 4"]),
    ({"n_positions": 8}, ["n_positions: 16 → 8"]),
    ({"seed": 7}, ["seed: 42 → 7"]),
    ({"total_batch_tokens": 256}, ["total_batch_tokens: 128 → 256"]),
    ({"stride": 8}, ["stride: 16 → 8"]),
    ({"resid_pdrop": 0.1}, ["resid_pdrop: 0.0 → 0.1"]),
    ({"tokenizer": "bpe", "vocab_size": 300}, ["tokenizer 'byte' → 'bpe'"]),
    ({"validation_fraction": 0.2}, ["validation_fraction 0.1 → 0.2"]),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[",".join(change) for change, _ in CHANGES])
def test_what_makes_it_another_run_is_refused(text, copied, change, named):
    before = contents(copied)
    with pytest.raises(ConfigError) as refusal:
        groundup.train(text, copied, **SHORT | {"max_steps": 20} | change)
    for words in named:
        assert words in str(refusal.value)
    assert contents(copied) == before, "a refusal must write nothing"


def test_changed_text_is_refused(copied, tmp_path):
    other = tmp_path / "text.txt"
    other.write_text(make_text(WORDS, seed=1), encoding="utf-8")
    before = contents(copied)
    with pytest.raises(ConfigError):
        groundup.train(other, copied, **SHORT | {"max_steps": 20})
    assert contents(copied) == before


def test_another_dataset_is_refused(copied, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(make_text(WORDS, seed=1), encoding="utf-8")
    groundup.prepare(other, tmp_path / "data", tokenizer="byte")
    before = contents(copied)
    with pytest.raises(ConfigError, match="dataset_sha256"):
        groundup.train(tmp_path / "data", copied, **SHORT | {"max_steps": 20})
    assert contents(copied) == before


@pytest.mark.slow
def test_a_refusal_is_one_line_and_exit_code_2(text, copied):
    done = command("train", text, "--output-dir", copied, *flags(SHORT | {"max_steps": 20, "seed": 7}), "--json")
    assert done.code == 2
    assert done.out == ""
    assert len(done.error_lines) == 1
    assert "seed: 42 → 7" in done.error_lines[0]


def test_what_may_change_may_change_and_is_said(text, copied, capsys):
    changed = SHORT | {"max_steps": 14, "learning_rate": 5e-4, "logging_steps": 2, "per_device_train_batch_size": 4}
    assert groundup.train(text, copied, **changed)["steps"] == 14
    said = capsys.readouterr().err
    for words in ("learning_rate 0.001 → 0.0005", "max_steps 12 → 14", "logging_steps 1 → 2"):
        assert words in said


def test_a_complete_run_is_left_as_it_is(text, copied, capsys):
    before = {path.name: last_state(copied) for path in checkpoints(copied)}
    again = groundup.train(text, copied, **SHORT)
    assert again["steps"] == 12
    assert "already complete" in capsys.readouterr().err
    assert {path.name: last_state(copied) for path in checkpoints(copied)} == before


def test_a_torn_last_row_is_written_again(text, copied, finished):
    """What a killed process left of its last line is dropped, and the rest stays."""
    metrics = copied / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    shutil.rmtree(copied / "checkpoint-12")
    metrics.write_bytes(b"".join(lines[:10]) + lines[10][:25])
    groundup.train(text, copied, **SHORT)
    assert ledger(copied) == ledger(finished)
    assert [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines()] == list(range(1, 13))


def test_an_older_checkpoint_gives_the_same_end(text, copied, finished):
    shutil.rmtree(copied / "checkpoint-12")
    groundup.train(text, copied, **SHORT)
    assert_same_end(copied, finished)


def test_every_file_of_a_resumed_runs_checkpoint_is_the_same(text, copied, finished):
    shutil.rmtree(copied / "checkpoint-12")
    groundup.train(text, copied, **SHORT)
    differing = [name for name, digest in last_state(finished).items() if last_state(copied)[name] != digest]
    assert differing == []


def test_the_final_evaluation_survives_a_kill_before_it(text, tmp_path):
    """Killed between the last checkpoint and the last evaluation: the same command still owes that evaluation."""
    options = TINY | {"max_steps": 4, "eval_steps": 2, "sample_tokens": 0}
    with groundup.open_training(text, tmp_path / "run", **options) as training:
        for _ in training:
            pass
        training.save()
    assert groundup.train(text, tmp_path / "run", **options)["eval_loss"] is not None


def test_an_evaluation_given_up_for_a_signal_is_made_up_for(text, tmp_path, monkeypatch):
    options = TINY | {"max_steps": 8, "eval_steps": 3, "sample_tokens": 0}
    groundup.train(text, tmp_path / "straight", **options)
    measure, calls = training_recipe.evaluate_sources, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 1:  # the first is before training, the second after step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    monkeypatch.setattr(training_recipe, "evaluate_sources", interrupted)
    with pytest.raises(Stopped):
        groundup.train(text, tmp_path / "run", **options)
    groundup.train(text, tmp_path / "run", **options)
    assert_same_end(tmp_path / "run", tmp_path / "straight")


def test_rows_of_a_run_that_never_saved_are_not_kept_for_another(text, tmp_path):
    """Killed before its first checkpoint, then started with another seed: a new run, with its own evaluation."""
    run, options = tmp_path / "run", TINY | {"max_steps": 2, "eval_steps": 2, "sample_tokens": 0}
    groundup.train(text, tmp_path / "straight", **options | {"seed": 7})
    groundup.prepare(text, run / "dataset", tokenizer="byte")
    shutil.copy(tmp_path / "straight" / "config.toml", run)
    append_row(run / "metrics.jsonl", {"step": 0, "epoch": 0.0, "eval_loss": 99.0, "num_input_tokens_seen": 0})
    groundup.train(text, run, **options | {"seed": 7})
    assert ledger(run) == ledger(tmp_path / "straight")


def test_rows_after_the_checkpoint_are_replaced_not_doubled(text, copied, finished):
    shutil.rmtree(copied / "checkpoint-12")
    append_row(copied / "metrics.jsonl", {"step": 11, "loss": 1.0, "num_input_tokens_seen": 0})
    groundup.train(text, copied, **SHORT)
    assert ledger(copied) == ledger(finished)
