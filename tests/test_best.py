"""Runs that end with their best checkpoint, and runs that stop early: what is kept and used, and what a restart changes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import groundup
from groundup.checkpoint.commit import checkpoints, step_of, verify
from groundup.evaluation.measure import Evaluation
from groundup.recipes.training import Training
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, make_text
from tests.runs import Killed, assert_same_end, contents, ledger, prepared

pytestmark = pytest.mark.usefixtures("quick")

# A constant rate, so that a run that is made longer is the same run.
RUN = TINY | {
    "max_steps": 16, "eval_steps": 4, "save_steps": 4, "sample_tokens": 0, "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
}  # fmt: skip
BEST = RUN | {"load_best_model_at_end": True}
STOPPING = RUN | {"early_stopping_patience": 2}
LOSSES = {4: 3.0, 8: 2.0, 12: 2.5, 16: 2.6, 20: 2.7, 24: 1.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the evaluations of a run measure given losses, by step; and kill the run in that of a step."""

    def choose(losses: Mapping[int, float], killed_at: int | None = None) -> None:
        def evaluate(training: Training, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
            if training.state.step == killed_at:
                raise Killed
            loss = losses.get(training.state.step, 5.0)
            return Evaluation(loss, 2.0**loss, loss, token_accuracy=loss / 10, tokens=1)

        monkeypatch.setattr(Training, "evaluate", evaluate)

    return choose


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory, words=400)


def steps_saved(run: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(run)]


@pytest.mark.parametrize(
    ("limit", "without", "with_best"),
    [
        (1, [16], [8, 16]),
        (2, [12, 16], [8, 16]),
        pytest.param(3, [8, 12, 16], [8, 12, 16], marks=pytest.mark.slow),
        pytest.param(0, [4, 8, 12, 16], [4, 8, 12, 16], marks=pytest.mark.slow),
    ],
)
def test_the_best_checkpoint_survives_rotation(data, tmp_path, measured, limit, without, with_best):
    measured(LOSSES)
    groundup.train(data, tmp_path / "last", **RUN | {"save_total_limit": limit})
    assert steps_saved(tmp_path / "last") == without
    groundup.train(data, tmp_path / "best", **BEST | {"save_total_limit": limit})
    assert steps_saved(tmp_path / "best") == with_best
    for path in checkpoints(tmp_path / "best"):
        verify(path)


def test_the_result_names_the_best_and_what_the_run_ends_with(data, tmp_path, measured, capsys):
    measured(LOSSES)
    run = tmp_path / "run"
    summary = groundup.train(data, run, **BEST)
    assert summary["best_checkpoint"] == summary["final_checkpoint"] == str(run / "checkpoint-8")
    assert (summary["steps"], summary["eval_loss"]) == (16, 2.6), "of the last step, as the row beside it"
    assert "best: checkpoint-8 with eval_loss 2.0000" in capsys.readouterr().err
    plain = groundup.train(data, tmp_path / "plain", **RUN | {"save_total_limit": 0})
    assert plain["best_checkpoint"].endswith("checkpoint-8")
    assert plain["final_checkpoint"].endswith("checkpoint-16")


def test_every_command_that_is_given_the_run_takes_the_best(data, tmp_path, measured):
    measured(LOSSES)
    run = tmp_path / "run"
    groundup.train(data, run, **BEST)
    best, last = (groundup.load(run / name).model.state_dict() for name in ("checkpoint-8", "checkpoint-16"))
    loaded = groundup.load(run)
    assert loaded.checkpoint == run / "checkpoint-8"
    assert all(torch.equal(value, best[name]) for name, value in loaded.model.state_dict().items())
    assert not torch.equal(best["wte.weight"], last["wte.weight"]), "or it would make no difference"
    assert groundup.evaluate(run, device="cpu")["checkpoint"] == str(run / "checkpoint-8")
    assert groundup.generate(run, prompt="the", max_new_tokens=4, device="cpu")["checkpoint"] == str(run / "checkpoint-8")
    assert groundup.score(run, text="the model", device="cpu")["checkpoint"] == str(run / "checkpoint-8")
    groundup.export(run, tmp_path / "hf", format="hf")
    groundup.export(run / "checkpoint-8", tmp_path / "same", format="hf")
    assert contents(tmp_path / "hf")["model.safetensors"] == contents(tmp_path / "same")["model.safetensors"]
    with groundup.open_training(data, tmp_path / "further", **RUN | {"init_from": run}) as training:
        assert torch.equal(training.model.wte.weight, best["wte.weight"])
    # Of a run without the option it is the last, whatever was measured.
    groundup.train(data, tmp_path / "plain", **RUN | {"save_total_limit": 0})
    assert groundup.load(tmp_path / "plain").checkpoint.name == "checkpoint-16"


def test_a_best_checkpoint_that_is_damaged_is_said_and_the_last_one_taken(data, tmp_path, measured, capsys):
    measured(LOSSES)
    run = tmp_path / "run"
    groundup.train(data, run, **BEST)
    (run / "checkpoint-8" / "model.safetensors").write_bytes(b"")
    assert groundup.load(run).checkpoint == run / "checkpoint-16"
    assert "WARNING: checkpoint" in capsys.readouterr().err


def test_a_run_that_goes_on_does_so_from_the_last_not_from_the_best(data, tmp_path, measured):
    measured(LOSSES)
    run, straight = tmp_path / "run", tmp_path / "straight"
    groundup.train(data, run, **BEST)
    summary = groundup.train(data, run, **BEST | {"max_steps": 24})
    groundup.train(data, straight, **BEST | {"max_steps": 24})
    assert ledger(run) == ledger(straight)
    assert contents(run / "checkpoint-24")["model.safetensors"] == contents(straight / "checkpoint-24")["model.safetensors"]
    assert summary["final_checkpoint"] == str(run / "checkpoint-24")
    assert steps_saved(run) == steps_saved(straight) == [20, 24], "what was the best is not any more"


def test_the_best_is_among_what_was_saved(data, tmp_path, measured, capsys):
    """Evaluated twice as often as saved: the very best figure is of weights that nobody has."""
    measured({2: 1.0, 4: 2.0, 6: 1.5, 8: 3.0, 10: 0.5, 12: 4.0})
    run = tmp_path / "run"
    summary = groundup.train(data, run, **BEST | {"eval_steps": 2, "max_steps": 12, "save_total_limit": 1})
    assert steps_saved(run) == [4, 12]
    assert summary["best_checkpoint"] == str(run / "checkpoint-4")
    assert groundup.load(run).checkpoint == run / "checkpoint-4"
    assert "best: checkpoint-4 with eval_loss 2.0000" in capsys.readouterr().err


def test_the_last_step_may_be_the_best_though_it_is_off_the_beat(data, tmp_path, measured):
    measured(LOSSES | {18: 1.5})
    summary = groundup.train(data, tmp_path / "run", **BEST | {"max_steps": 18})
    assert summary["final_checkpoint"] == str(tmp_path / "run" / "checkpoint-18")
    assert groundup.load(tmp_path / "run").checkpoint.name == "checkpoint-18"


@pytest.mark.parametrize(
    ("options", "best"),
    [({"metric_for_best_model": "token_accuracy"}, 4), ({"metric_for_best_model": "eval_token_accuracy"}, 4),
     ({"metric_for_best_model": "token_accuracy", "greater_is_better": False}, 8), ({"greater_is_better": True}, 4),
     ({"metric_for_best_model": "perplexity"}, 8), ({"metric_for_best_model": "bits_per_byte"}, 8)],
)  # fmt: skip
def test_the_metric_decides_during_the_run_and_afterwards(data, tmp_path, measured, options, best):
    measured(LOSSES)
    summary = groundup.train(data, tmp_path / "run", **BEST | options | {"save_total_limit": 1})
    assert steps_saved(tmp_path / "run") == [best, 16]
    assert summary["best_checkpoint"] == str(groundup.load(tmp_path / "run").checkpoint)


def test_the_averaged_weights_may_decide(data, tmp_path, measured, monkeypatch):
    measured(LOSSES)
    averaged = {4: 3.0, 8: 2.5, 12: 1.5, 16: 2.0}
    monkeypatch.setattr(
        Training, "evaluate_average", lambda training, stop: Evaluation(averaged.get(training.state.step, 5.0), 1, 1, 1, 1)
    )
    options = BEST | {"ema_decay": 0.9, "metric_for_best_model": "ema_loss", "save_total_limit": 1}
    summary = groundup.train(data, tmp_path / "run", **options)
    assert steps_saved(tmp_path / "run") == [12, 16]
    assert summary["best_checkpoint"].endswith("checkpoint-12")


def test_one_source_may_decide(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).write_text(make_text(300, seed), encoding="utf-8")
    real = Training.evaluate

    def evaluate(training: Training, should_stop: Any = lambda: False) -> Any:
        found = real(training, should_stop)
        found.sources["b"] = Evaluation(LOSSES.get(training.state.step, 5.0), 1, 1, 1, 1)
        return found

    monkeypatch.setattr(Training, "evaluate", evaluate)
    named = [f"a={tmp_path / 'a'}:1", f"b={tmp_path / 'b'}:1"]
    options = BEST | {"source": named, "metric_for_best_model": "b_loss", "save_total_limit": 1}
    summary = groundup.train([], tmp_path / "run", **options)
    assert summary["best_checkpoint"].endswith("checkpoint-8")
    assert groundup.load(tmp_path / "run").checkpoint.name == "checkpoint-8"


FIGURES = {"loss", "perplexity", "bits_per_byte", "token_accuracy", "tokens"}


def test_the_keys_of_an_evaluation(tmp_path):
    """Every figure of the whole text, of each source and of the averaged weights; perplexity and total follow from losses."""
    for name, seed in (("one", 0), ("two-2", 1)):
        (tmp_path / name).write_text(make_text(300, seed), encoding="utf-8")
    named = [f"one={tmp_path / 'one'}:1", f"two-2={tmp_path / 'two-2'}:3"]
    groundup.train([], tmp_path / "run", **RUN | {"source": named, "ema_decay": 0.9, "max_steps": 4})
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 4]
    prefixes = ("eval_", "eval_one_", "eval_two-2_", "eval_ema_")
    expected = {prefix + figure for prefix in prefixes for figure in FIGURES}
    for row in rows:
        assert row.keys() == expected | {"step", "epoch", "num_input_tokens_seen"}
        assert row["eval_one_tokens"] + row["eval_two-2_tokens"] == row["eval_tokens"] == row["eval_ema_tokens"]
        parts = sum(row[f"eval_{name}_loss"] * row[f"eval_{name}_tokens"] for name in ("one", "two-2"))
        assert row["eval_loss"] == pytest.approx(parts / row["eval_tokens"], rel=1e-12)
    assert rows[0]["eval_ema_loss"] == rows[0]["eval_loss"], "before the first step the average is the weights"
    assert rows[1]["eval_ema_loss"] != rows[1]["eval_loss"]


def test_it_stops_where_the_rule_says(data, tmp_path, measured, capsys):
    measured(LOSSES)
    run = tmp_path / "run"
    summary = groundup.train(data, run, **STOPPING | {"max_steps": 100})
    assert (summary["steps"], summary["eval_loss"]) == (16, 2.6), "12 and 16 did not beat 8"
    assert summary["final_checkpoint"] == str(run / "checkpoint-16")
    said = capsys.readouterr().err
    assert "early stopping at step 16: eval_loss has not improved for 2 evaluations" in said
    # A small step down is none below the threshold.
    measured({4: 3.0, 8: 2.95, 12: 2.9, 16: 2.0})
    summary = groundup.train(data, tmp_path / "threshold", **STOPPING | {"max_steps": 100, "early_stopping_threshold": 0.1})
    assert summary["steps"] == 12


def test_a_stop_between_two_checkpoints_saves_one(data, tmp_path, measured):
    measured({2: 1.0})
    summary = groundup.train(data, tmp_path / "run", **STOPPING | {"eval_steps": 2, "save_steps": 5, "save_total_limit": 1})
    assert summary["steps"] == 6
    assert steps_saved(tmp_path / "run") == [6]


def test_the_same_command_again_trains_nothing(data, tmp_path, measured, capsys):
    measured(LOSSES)
    run = tmp_path / "run"
    options = STOPPING | {"max_steps": 100, "load_best_model_at_end": True}
    first = groundup.train(data, run, **options)
    before = contents(run)
    capsys.readouterr()
    again = groundup.train(data, run, **options)
    said = capsys.readouterr().err
    assert "already complete at step 16" in said
    assert "--early-stopping-patience" in said, "what would make it go on; more steps would not"
    assert "--max-steps" not in said
    assert again == first | {"seconds": 0.0}
    assert contents(run) == before
    # More patience goes on, as if it had been there from the start.
    more = groundup.train(data, run, **options | {"early_stopping_patience": 3})
    assert more["steps"] == 20


def test_the_result_says_what_the_other_commands_use(data, tmp_path, measured):
    """A run that is complete keeps its configuration: asked for the best afterwards, it says what it ended with."""
    measured(LOSSES)
    run = tmp_path / "run"
    groundup.train(data, run, **RUN | {"save_total_limit": 0})
    summary = groundup.train(data, run, **BEST | {"save_total_limit": 0})
    assert summary["final_checkpoint"] == str(groundup.load(run).checkpoint) == str(run / "checkpoint-16")
    assert summary["best_checkpoint"] == str(run / "checkpoint-8")


@pytest.mark.parametrize(
    ("killed_at", "save_steps"),
    [(16, 4), (12, 8), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((8, 4), (12, 3), (16, 8), (16, 50)))],
)
def test_killed_before_an_evaluation_it_stops_at_the_same_step(data, tmp_path, measured, killed_at, save_steps):
    """Between the checkpoint and its evaluation, or between two checkpoints: the rule is asked at the same steps."""
    run, straight, options = tmp_path / "run", tmp_path / "straight", STOPPING | {"max_steps": 100, "save_steps": save_steps}
    measured(LOSSES)
    groundup.train(data, straight, **options)
    measured(LOSSES, killed_at)
    with pytest.raises(Killed):
        groundup.train(data, run, **options)
    measured(LOSSES)
    summary = groundup.train(data, run, **options)
    assert summary["steps"] == 16
    assert_same_end(run, straight)
    assert steps_saved(run)[-1] == 16


@pytest.mark.parametrize("killed_at", [16, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 8, 12))])
def test_killed_before_an_evaluation_it_keeps_the_same_best(data, tmp_path, measured, killed_at, capsys):
    """The last evaluation too: it is made up for, and then decides."""
    run, straight, options = tmp_path / "run", tmp_path / "straight", BEST | {"save_total_limit": 1}
    losses = LOSSES | {16: 1.0}
    measured(losses)
    expected = groundup.train(data, straight, **options)
    measured(losses, killed_at)
    with pytest.raises(Killed):
        groundup.train(data, run, **options)
    measured(losses)
    capsys.readouterr()
    summary = groundup.train(data, run, **options)
    assert "best: checkpoint-16 with eval_loss 1.0000" in capsys.readouterr().err
    assert steps_saved(run) == steps_saved(straight) == [16]
    assert_same_end(run, straight)
    assert Path(summary["final_checkpoint"]).name == Path(expected["final_checkpoint"]).name


def test_the_made_up_evaluation_reaches_every_reader(data, tmp_path, measured, monkeypatch):
    """A run that was killed before its last evaluation sends it where the others went."""
    sent: list[dict[str, Any]] = []

    class Listening:
        def __enter__(self) -> "Listening":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def log(self, row: dict[str, Any]) -> None:
            sent.append(row)

    monkeypatch.setattr("groundup.recipes.train.open_sinks", lambda *arguments, **options: Listening())
    measured(LOSSES, 16)
    with pytest.raises(Killed):
        groundup.train(data, tmp_path / "run", **RUN)
    measured(LOSSES)
    groundup.train(data, tmp_path / "run", **RUN)
    assert [row["step"] for row in sent if "eval_loss" in row] == [0, 4, 8, 12, 16]


@pytest.mark.slow
def test_real_losses_decide_too(data, tmp_path):
    """At a rate that destroys what was learned, the first evaluation is the best one."""
    options = BEST | {"learning_rate": 0.3, "lr_scheduler_type": "linear", "warmup_steps": 14, "max_grad_norm": 0}
    summary = groundup.train(data, tmp_path / "run", **options | {"max_steps": 20, "save_total_limit": 2})
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") and row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best != 20, "or the last would be the best"
    assert summary["best_checkpoint"] == summary["final_checkpoint"] == str(tmp_path / "run" / f"checkpoint-{best}")
    assert groundup.evaluate(tmp_path / "run", device="cpu", bf16=False)["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert json.dumps(summary)
