"""Which checkpoint is kept, which is the best, and when a run stops early: as transformers' Trainer."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from groundup.config.load import Given, resolve
from groundup.config.options import TRAIN_GROUPS, SelectionOptions
from groundup.errors import ConfigError
from groundup.recipes.selection import best_of, kept, metric_of, out_of_patience


def rows(values, metric="eval_loss"):
    return [{"step": 0, metric: -1e9}, *({"step": 10 * (i + 1), metric: value} for i, value in enumerate(values))]


def test_the_best_is_the_lowest_loss_and_the_earlier_of_two():
    assert best_of(rows([3.0, 1.0, 2.0, 1.0]), SelectionOptions()).step == 20
    assert best_of(rows([]), SelectionOptions()) is None
    assert best_of([{"step": 5, "loss": 1.0}], SelectionOptions()) is None


@pytest.mark.parametrize(
    ("metric", "greater", "best"),
    [("token_accuracy", None, 20), ("eval_token_accuracy", None, 20), ("token_accuracy", False, 10), ("loss", True, 20),
     ("perplexity", None, 10), ("bits_per_byte", None, 10), ("ema_loss", None, 10), ("wiki_loss", None, 10)],
)  # fmt: skip
def test_what_is_better_follows_from_the_metric_unless_it_is_said(metric, greater, best):
    options = SelectionOptions(metric_for_best_model=metric, greater_is_better=greater)
    assert best_of(rows([0.1, 0.9, 0.5], metric_of(options)), options).step == best


@pytest.fixture(scope="module")
def trainer_callback():
    return pytest.importorskip("transformers.trainer_callback")


def test_early_stopping_agrees_with_transformers(trainer_callback):
    """Its callback is shown the same evaluations, with the Trainer's own rule for the best metric between them."""
    random.seed(1)
    stopped_at = []
    for _ in range(300):
        values = [round(random.uniform(0, 1), 1) for _ in range(12)]
        patience, threshold, greater = random.randint(1, 4), random.choice([0.0, 0.1, 0.25]), random.random() < 0.5
        callback = trainer_callback.EarlyStoppingCallback(patience, threshold)
        state, control = trainer_callback.TrainerState(), trainer_callback.TrainerControl()
        args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater)
        theirs = None
        for number, value in enumerate(values):
            callback.on_evaluate(args, state, control, {"eval_loss": value})
            better = state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric)
            state.best_metric = value if better else state.best_metric
            if control.should_training_stop:
                theirs = number
                break
        options = SelectionOptions(
            early_stopping_patience=patience, early_stopping_threshold=threshold, greater_is_better=greater
        )
        ours = next((n for n in range(len(values)) if out_of_patience(rows(values[: n + 1]), options)), None)
        assert ours == theirs, (values, patience, threshold, greater)
        stopped_at.append(ours)
    assert len(set(stopped_at)) > 5


def make(run: Path, steps) -> None:
    for step in steps:
        (run / f"checkpoint-{step}").mkdir(parents=True)


def test_rotation_agrees_with_transformers(tmp_path):
    """Its own rotation deletes from the same folders, saved one after the other."""
    utils = pytest.importorskip("transformers.trainer_utils")
    random.seed(2)
    for case in range(60):
        theirs, ours = tmp_path / f"theirs-{case}", tmp_path / f"ours-{case}"
        limit = random.randint(1, 4)
        best = None
        for step in range(10, 100, 10):
            make(theirs, [step])
            make(ours, [step])
            if best is None or random.random() < 0.3:
                best = step
            utils.rotate_checkpoints(
                output_dir=str(theirs), save_total_limit=limit, best_model_checkpoint=str(theirs / f"checkpoint-{best}")
            )
            keep = kept(ours, limit, SimpleNamespace(step=best))
            for path in ours.iterdir():
                if path not in keep:
                    path.rmdir()
            assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}, (limit, best, step)


def test_without_a_limit_all_are_kept(tmp_path):
    make(tmp_path, [1, 2, 3])
    assert len(kept(tmp_path, 0, None)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_best_model_at_end": True, "save_steps": 30, "eval_steps": 20}, "save_steps 30 .* multiple of eval_steps 20"),
        ({"load_best_model_at_end": True, "save_steps": 0}, "needs every saved step to be evaluated"),
        ({"load_best_model_at_end": True, "eval_steps": 0}, "needs every saved step to be evaluated"),
        ({"early_stopping_patience": 2, "eval_steps": 0}, "waits for evaluations"),
        ({"metric_for_best_model": "accuracy"}, "not measured in this run; it measures loss, perplexity"),
        ({"metric_for_best_model": "ema_loss"}, "not measured in this run"),
        ({"metric_for_best_model": "wiki_accuracy"}, "not measured in this run"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        resolve(TRAIN_GROUPS, {name: Given(value, f"--{name}") for name, value in options.items()})


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({}, 10),
        ({"metric_for_best_model": "eval_wiki_loss", "source": ["wiki=a:1"]}, 20),
        ({"metric_for_best_model": "wiki_token_accuracy", "source": ["wiki=a:1"]}, 30),
        ({"metric_for_best_model": "ema_loss", "ema_decay": 0.9}, 40),
    ],
)
def test_a_metric_of_a_source_or_of_the_average_may_decide(options, best):
    settings = resolve(TRAIN_GROUPS, {name: Given(value, f"--{name}") for name, value in options.items()})
    columns = {
        "eval_loss": [1.0, 2.0, 2.0, 2.0], "eval_wiki_loss": [2.0, 1.0, 2.0, 2.0],
        "eval_wiki_token_accuracy": [0.1, 0.1, 0.2, 0.1], "eval_ema_loss": [2.0, 2.0, 2.0, 1.0],
    }  # fmt: skip
    measured = [{"step": 10 * (i + 1), **{name: column[i] for name, column in columns.items()}} for i in range(4)]
    assert best_of(measured, settings[SelectionOptions]).step == best
