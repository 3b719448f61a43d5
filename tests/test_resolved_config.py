"""RUN/config.toml says all of a run: it resolves to itself, and another run from it alone is the same one."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import groundup
from groundup.cli.main import run as command
from groundup.config.load import read_config_file, resolve
from groundup.config.options import TRAIN_GROUPS
from groundup.config.ramp import Ramp
from tests.conftest import TINY, make_text
from tests.runs import ledger

pytestmark = pytest.mark.usefixtures("quick")

RUN = TINY | {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "sample_tokens": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and, as another run, weights to start or to learn from."""
    found = tmp_path_factory.mktemp("sources")
    (found / "a.txt").write_text(make_text(600), encoding="utf-8")
    (found / "b=1.txt").write_text(make_text(300, seed=1).upper(), encoding="utf-8")
    groundup.train(found / "a.txt", found / "model", **RUN | {"eval_steps": 0})
    return found


def options_of(name: str, folder: Path) -> dict[str, Any]:
    model = str(folder / "model")
    shape = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd")}
    return {
        "ramps": {"total_batch_tokens": "32:128@0.75", "sequence_length": "4:16@2"},
        "sources": {"source": [f"a={folder / 'a.txt'}:0.7", f"b={folder / 'b=1.txt'}:0.3"], "metric_for_best_model": "b_loss"},
        "passes": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "total_batch_tokens": None},
        "tokens": {"max_train_tokens": 700, "max_steps": None},
        "epochs": {"num_train_epochs": 0.1, "max_steps": None},
        "selection": {"load_best_model_at_end": True, "early_stopping_patience": 1, "greater_is_better": True,
                      "early_stopping_threshold": 0.01, "metric_for_best_model": "eval_token_accuracy"},
        "average": {"ema_decay": 0.9, "metric_for_best_model": "ema_loss"},
        "spikes": {"spike_action": "rollback", "spike_threshold": 6.5, "spike_window": 20, "max_rollbacks": 3},
        "precision": {"fp16": True},
        "decay": {"lr_scheduler_type": "warmup_stable_decay", "num_decay_steps": 0.5, "lr_decay_type": "1-sqrt",
                  "min_lr_rate": 0.0, "warmup_steps": 1},
        "constant": {"lr_scheduler_type": "constant"},
        "noam": {"lr_scheduler_type": "inverse_sqrt", "inverse_sqrt_scale": 0.01, "learning_rate": None},
        "optimizer": {"optim": "sgd", "weight_decay_type": "coupled", "sgd_momentum": 0.5},
        "variants": {"norm": "rms", "norm_position": "post", "activation_function": "gelu", "resid_pdrop": 0.1,
                     "init": "orthogonal", "tie_word_embeddings": False},
        "holes": {"fim_rate": 0.5, "fim_spm_rate": 0.2},
        "smoothing": {"label_smoothing_factor": 0.1, "stride": 8},
        "teacher": {"teacher": model, "teacher_weight": 0.25, "teacher_temperature": 1.5},
        "start": {"init_from": model, "freeze": ["wte*", "h.0.*"], "tokenizer": None, **dict.fromkeys(shape, None)},
        "others": {"health_steps": 2, "report_to": [], "sample_prompt": 'the "model"\n', "activation_checkpointing": True},
    }[name]  # fmt: skip


KINDS = ("ramps", "sources", "passes", "tokens", "selection", "start")
MORE = ("epochs", "average", "spikes", "precision", "decay", "constant", "noam", "optimizer", "variants", "holes", "smoothing",
        "teacher", "others")  # fmt: skip


def trained(name: str, folder: Path, run: Path) -> dict[str, Any]:
    """Train on the text of the folder; returns every option that took effect, by name."""
    options = {key: value for key, value in (RUN | options_of(name, folder)).items() if value is not None}
    sources = [] if "source" in options else [folder / "a.txt"]
    groundup.train(sources, run, **options)
    with groundup.open_training(sources, run, **options) as training:
        return training.settings.flat()


def resolved(run: Path) -> dict[str, Any]:
    given = read_config_file(run / "config.toml")
    del given["sources"]
    return resolve(TRAIN_GROUPS, given).flat()


@pytest.mark.parametrize("name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_configuration_resolves_to_itself_and_makes_the_same_run(folder, tmp_path, name, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    options = trained(name, folder, run)
    assert resolved(run) == options
    assert command(["train", "--config", str(run / "config.toml"), "--output-dir", str(other)]) == 0, capsys.readouterr().err
    assert ledger(other) == ledger(run)
    assert (checkpoint_of(other)).read_bytes() == checkpoint_of(run).read_bytes()
    assert documents(other) == documents(run), "and its configuration is the same again"


def checkpoint_of(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])) / "model.safetensors"


def documents(run: Path) -> dict[str, Any]:
    return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))


def test_a_ramp_is_text_in_the_file_and_a_ramp_again(folder, tmp_path):
    trained("ramps", folder, tmp_path / "run")
    assert documents(tmp_path / "run")["batch"]["total_batch_tokens"] == "32:128@0.75"
    assert isinstance(resolved(tmp_path / "run")["sequence_length"], Ramp)


def test_flags_win_over_the_file(folder, tmp_path):
    trained("ramps", folder, tmp_path / "run")
    more = ["--sequence-length", "0", "--total-batch-tokens", "64", "--max-steps", "2"]
    assert (
        command(["train", "--config", str(tmp_path / "run" / "config.toml"), "--output-dir", str(tmp_path / "new"), *more]) == 0
    )
    found = resolved(tmp_path / "new")
    assert (found["sequence_length"], found["total_batch_tokens"], found["max_steps"]) == (0, 64, 2)
    assert found["n_embd"] == TINY["n_embd"]


def test_a_file_with_a_ramp_and_a_number_of_passes_is_refused(folder, tmp_path, capsys):
    """No run writes such a file: somebody did, and one of them would have no effect."""
    (tmp_path / "mine.toml").write_text('total_batch_tokens = "32:128@0.5"\ngradient_accumulation_steps = 2\n')
    arguments = ["train", str(folder / "a.txt"), "--config", str(tmp_path / "mine.toml"), "--output-dir", str(tmp_path / "run")]
    assert command(arguments) == 2
    assert "both set the global batch; give one of them" in capsys.readouterr().err


@pytest.mark.slow
def test_a_size_that_was_found_is_looked_for_again(folder, tmp_path):
    """Another machine may hold more: the file says auto. The batches are the same, and sums agree but for their rounding."""
    run, other = tmp_path / "run", tmp_path / "other"
    options = RUN | {"per_device_train_batch_size": "auto", "per_device_eval_batch_size": "auto"}
    groundup.train(folder / "a.txt", run, **options | options_of("ramps", folder))
    assert documents(run)["batch"]["per_device_train_batch_size"] == "auto"
    assert command(["train", "--config", str(run / "config.toml"), "--output-dir", str(other)]) == 0
    for one, another in zip(ledger(run), ledger(other), strict=True):
        for value, again in zip(one, another, strict=True):
            assert value == (pytest.approx(again, rel=1e-5) if isinstance(again, float) else again)
