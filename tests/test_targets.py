"""Runs that learn from more than the text: from a teacher, and from targets that are smoothed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import groundup
from groundup.cli.main import run as command
from groundup.errors import CheckpointError, ConfigError
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, flags, make_text
from tests.runs import assert_same_end, contents, prepared

pytestmark = pytest.mark.usefixtures("quick")

RUN = TINY | {"eval_steps": 6, "sample_tokens": 0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory, words=800)


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another shape, and a rate that lets it know something after a few steps."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    groundup.train(data, run, **RUN | {"n_embd": 24, "n_layer": 1, "learning_rate": 1e-2, "max_steps": 20, "eval_steps": 0})
    return run


def one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    capsys.readouterr()
    assert command(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]
    assert len(lines) == 1
    return lines[0]


def refused(data: Path, run: Path, capsys: pytest.CaptureFixture[str], options: dict, words: str) -> None:
    """Python and the command line refuse it alike, in one line, and nothing is left behind or changed."""
    before = contents(run) if run.exists() else None
    with pytest.raises(ConfigError, match=words) as error:
        groundup.train(data, run, **options)
    assert "\n" not in str(error.value)
    assert str(error.value) in one_line(capsys, ["train", str(data), "--output-dir", str(run), *flags(options)], 2)
    assert (contents(run) if run.exists() else None) == before


def test_the_loss_of_a_student_is_hintons(data, teacher, tmp_path):
    """The first step against (1 - m) · cross-entropy + m · τ² · KL, in float64."""
    options = RUN | {"teacher": teacher, "teacher_temperature": 3.0, "teacher_weight": 0.7}
    with groundup.open_training(data, tmp_path / "run", **options) as training:
        tokens = torch.from_numpy(training.course.samples.read(np.arange(8)))
        inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
        with torch.no_grad():
            taught = groundup.load(teacher).model
            theirs = taught.logits(taught(inputs)).flatten(0, 1).double()
            ours = training.model.logits(training.model(inputs)).flatten(0, 1).double()
        soft = F.kl_div(F.log_softmax(ours / 3, -1), F.log_softmax(theirs / 3, -1), reduction="batchmean", log_target=True)
        expected = 0.3 * F.cross_entropy(ours, labels) + 0.7 * 9 * soft
        first = next(iter(training))
        assert first.loss == pytest.approx(float(expected), rel=1e-5)
        assert first.loss != pytest.approx(float(F.cross_entropy(ours, labels)), rel=0.01)
        weights = taught.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in groundup.load(teacher).model.state_dict().items())


def test_an_evaluation_asks_no_teacher(data, teacher, tmp_path):
    groundup.train(data, tmp_path / "run", **RUN | {"teacher": teacher})
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["eval_loss"] == pytest.approx(groundup.evaluate(tmp_path / "run", device="cpu")["eval_loss"], rel=1e-6)


def test_a_student_goes_on_as_if_never_interrupted(data, teacher, tmp_path):
    options = RUN | {"teacher": teacher, "resid_pdrop": 0.1, "eval_steps": 0}
    groundup.train(data, tmp_path / "straight", **options)
    for steps in (5, 12):
        groundup.train(data, tmp_path / "run", **options | {"max_steps": steps})
    assert_same_end(tmp_path / "run", tmp_path / "straight")


def test_a_run_cannot_teach_itself(data, teacher, tmp_path, capsys):
    groundup.train(data, tmp_path / "run", **RUN | {"max_steps": 1})
    options = RUN | {"teacher": tmp_path / "run"}
    refused(data, tmp_path / "run", capsys, options, "teacher: .*run is the --output-dir itself; name another folder")
    # However it is spelled.
    options = RUN | {"teacher": f"{tmp_path}/nowhere/../run"}
    refused(data, tmp_path / "run", capsys, options, "is the --output-dir itself")


def test_a_teacher_of_other_tokens_is_refused(data, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(make_text(800), encoding="utf-8")
    options = TINY | {"tokenizer": "bpe", "vocab_size": 300, "max_steps": 1, "eval_steps": 0}
    groundup.train(tmp_path / "text.txt", tmp_path / "other", **options)
    refused(
        data, tmp_path / "run", capsys, RUN | {"teacher": tmp_path / "other"},
        r"teacher: .*other has another tokenizer than this run \(300 and 257 ids\)",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_refused(data, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="teacher: "):
        groundup.train(data, tmp_path / "run", **RUN | {"teacher": tmp_path / "nobody"})
    arguments = ["train", str(data), "--output-dir", str(tmp_path / "run"), *flags(RUN | {"teacher": tmp_path / "nobody"})]
    assert "teacher: " in one_line(capsys, arguments, 4)
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_another_run(data, teacher, tmp_path, capsys):
    run, options = tmp_path / "run", RUN | {"teacher": teacher, "max_steps": 4}
    groundup.train(data, run, **options)
    more = options | {"max_steps": 6}
    without = {name: value for name, value in more.items() if name != "teacher"}
    words = "cannot resume checkpoint-4 with changed teacher: [0-9a-f]{16} → "
    refused(data, run, capsys, without, f"{words}default")
    refused(data, run, capsys, more | {"teacher": teacher / "checkpoint-16"}, f"{words}[0-9a-f]{{16}}")
    # The same checkpoint under its own name is the same teacher; how much it says may change.
    capsys.readouterr()
    groundup.train(data, run, **more | {"teacher": teacher / "checkpoint-20", "teacher_weight": 0.25})
    assert "changed since this run was started: teacher_weight 0.5 → 0.25" in capsys.readouterr().err


def test_a_teacher_that_trained_on_is_another_one(data, tmp_path, capsys):
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    groundup.train(data, teacher, **RUN | {"max_steps": 4})
    options = RUN | {"teacher": teacher, "max_steps": 4}
    groundup.train(data, run, **options)
    groundup.train(data, teacher, **RUN | {"max_steps": 8})
    refused(data, run, capsys, options | {"max_steps": 6}, "changed teacher: [0-9a-f]{16} → [0-9a-f]{16}")
    assert groundup.train(data, run, **options | {"teacher": teacher / "checkpoint-4", "max_steps": 6})["steps"] == 6


def test_a_teacher_that_was_moved_is_the_same_one(data, teacher, tmp_path):
    """Its weights are what counts, and other weights in its place are another teacher."""
    moved, run = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(teacher / "checkpoint-20", moved / "checkpoint-20")
    groundup.train(data, run, **RUN | {"teacher": teacher, "max_steps": 4})
    assert groundup.train(data, run, **RUN | {"teacher": moved / "checkpoint-20", "max_steps": 6})["steps"] == 6


def test_a_teacher_is_the_same_from_wherever_the_command_is_given(data, teacher, tmp_path, monkeypatch):
    options = RUN | {"max_steps": 2, "eval_steps": 0}
    monkeypatch.chdir(teacher.parent)
    groundup.train(data, tmp_path / "run", **options | {"teacher": "run"})
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(teacher, tmp_path)
    assert groundup.train(data, tmp_path / "run", **options | {"teacher": relative, "max_steps": 4})["steps"] == 4
    assert groundup.train(data, tmp_path / "run", **options | {"teacher": teacher, "max_steps": 6})["steps"] == 6


def test_the_best_checkpoint_teaches_where_the_run_ends_with_it(data, tmp_path, capsys):
    """As every command that is given the run."""
    options = RUN | {"load_best_model_at_end": True, "greater_is_better": True, "eval_steps": 4, "save_total_limit": 0}
    groundup.train(data, tmp_path / "teacher", **options)
    best = groundup.load(tmp_path / "teacher").checkpoint
    assert best.name == "checkpoint-4", "the highest loss is the first"
    capsys.readouterr()
    groundup.train(data, tmp_path / "run", **RUN | {"teacher": tmp_path / "teacher", "max_steps": 1})
    assert f"teacher: {best}, " in capsys.readouterr().err


def test_smoothing_is_in_the_loss_that_is_learned_from_and_not_in_the_one_that_is_measured(data, tmp_path):
    options = RUN | {"label_smoothing_factor": 0.2, "eval_steps": 1, "max_steps": 2}
    with groundup.open_training(data, tmp_path / "probe", **options) as training:
        tokens = torch.from_numpy(training.course.samples.read(np.arange(8)))
        with torch.no_grad():
            logits = training.model.logits(training.model(tokens[:, :-1])).flatten(0, 1).double()
        smooth, plain = (F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=factor) for factor in (0.2, 0.0))
        evaluated = training.evaluate()
    groundup.train(data, tmp_path / "run", **options)
    groundup.train(data, tmp_path / "plain", **options | {"label_smoothing_factor": 0.0})
    rows, without = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("run", "plain"))
    losses, plain_losses = ([row["loss"] for row in found if "loss" in row] for found in (rows, without))
    assert losses[0] == pytest.approx(float(smooth), rel=1e-6)
    assert plain_losses[0] == pytest.approx(float(plain), rel=1e-6)
    assert losses[0] != plain_losses[0]
    measured, measured_without = ([row["eval_loss"] for row in found if "eval_loss" in row] for found in (rows, without))
    assert measured[0] == measured_without[0] == evaluated.loss, "before the first step both are the same model"
    assert measured[2] != measured_without[2], "it has learned from other targets"
    assert measured[2] == pytest.approx(groundup.evaluate(tmp_path / "run", device="cpu")["eval_loss"], rel=1e-6)
