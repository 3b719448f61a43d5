"""The moving average of the weights: its formula, its file, and every command that can use it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import groundup
from groundup.checkpoint.average import load_average
from groundup.checkpoint.commit import checkpoints
from groundup.cli.main import run as command
from groundup.errors import CheckpointError, ConfigError
from groundup.model.gpt2 import GPT2
from groundup.tracking.metrics import read_rows
from groundup.training.average import WeightAverage
from tests.conftest import TINY, flags
from tests.runs import contents, ledger, prepared

pytestmark = pytest.mark.usefixtures("quick")

QUIET = TINY | {"eval_steps": 0, "sample_tokens": 0}
AVERAGED = QUIET | {"ema_decay": 0.6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory, words=400)


@pytest.fixture(scope="module")
def averaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with averaged weights."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    groundup.train(data, run, **AVERAGED)
    return run


def weights(model: GPT2) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(decay: float, after_each_step: list[dict[str, Tensor] | None], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """a ← d a + (1 − d) w with d = min(decay, (1 + t) / (10 + t)) after t updates, in float64; None is a step without one."""
    average, updates = {name: tensor.double() for name, tensor in first.items()}, 0
    for current in after_each_step:
        if current is not None:
            updates += 1
            d = min(decay, (1 + updates) / (10 + updates))
            average = {name: d * average[name] + (1 - d) * tensor.double() for name, tensor in current.items()}
    return average


@pytest.mark.parametrize("decay", [0.3, 0.999], ids=["soon constant", "still growing"])
def test_the_average_is_the_formula(data, tmp_path, decay):
    """0.3 is reached after three updates; 0.999 is far away, so the growing decay decides throughout."""
    with groundup.open_training(data, tmp_path / "run", **QUIET | {"ema_decay": decay}) as training:
        first = weights(training.model)
        seen = [weights(training.model) for _ in training]
        assert len(seen) == 12
        expected = by_hand(decay, seen, first)
        assert training.average.tensors.keys() == expected.keys()
        for name, tensor in training.average.tensors.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
            if name.endswith("weight"):
                assert not torch.allclose(tensor, seen[-1][name], rtol=1e-5, atol=1e-7), "it is behind the weights"


def test_skipped_steps_do_not_count(data, tmp_path):
    """Neither as an update of the average nor in its decay."""
    with groundup.open_training(data, tmp_path / "run", **AVERAGED | {"ema_decay": 0.999}) as training:
        first, seen = weights(training.model), []
        for number, step in enumerate(training, 1):
            seen.append(None if step.skipped else weights(training.model))
            # The gradients of steps 3, 4 and 8 are no numbers.
            if number in (2, 7):
                hook = training.model.ln_f.bias.register_hook(lambda gradient: gradient * torch.nan)
            elif number in (4, 8):
                hook.remove()
        assert [number for number, w in enumerate(seen, 1) if w is None] == [3, 4, 8]
        for name, expected in by_hand(0.999, seen, first).items():
            torch.testing.assert_close(training.average.tensors[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_statistics_of_a_batch_norm_are_copied(data, tmp_path):
    with groundup.open_training(data, tmp_path / "run", **AVERAGED | {"norm": "batch", "max_steps": 3}) as training:
        list(training)
        buffers = dict(training.model.named_buffers())
        assert buffers
        assert all(torch.equal(training.average.tensors[name], value) for name, value in buffers.items())


def test_training_does_not_notice(data, averaged, tmp_path):
    """The weights, the optimizer and what is logged are those of a run without an average, bit for bit."""
    groundup.train(data, tmp_path / "run", **QUIET)
    plain, other = contents(tmp_path / "run" / "checkpoint-12"), contents(averaged / "checkpoint-12")
    assert other.keys() - plain.keys() == {"ema.safetensors"}
    assert [name for name in ("model.safetensors", "optimizer.safetensors") if plain[name] != other[name]] == []
    assert ledger(tmp_path / "run") == ledger(averaged)


def test_an_evaluation_of_the_average_leaves_the_weights_as_they_are(data, tmp_path):
    with groundup.open_training(data, tmp_path / "run", **AVERAGED) as training:
        next(iter(training))
        before, average = weights(training.model), {n: t.clone() for n, t in training.average.tensors.items()}
        plain, smooth = training.evaluate(), training.evaluate_average()
        assert same(weights(training.model), before)
        assert same(training.average.tensors, average)
        with torch.no_grad():
            for name, tensor in training.model.named_parameters():
                tensor.copy_(average[name])
        assert training.evaluate() == smooth != plain
        # Given up in the middle, too.
        with pytest.raises(RuntimeError), training.average.applied(training.model):
            raise RuntimeError
        assert same(training.average.tensors, average)


def test_every_command_can_use_it(data, averaged, tmp_path):
    files = load_file(averaged / "checkpoint-12" / "ema.safetensors")
    loaded = groundup.load(averaged, weights="ema")
    assert loaded.checkpoint == averaged / "checkpoint-12"
    assert same(weights(loaded.model), files)
    assert not same(weights(groundup.load(averaged).model), files)
    plain, smooth = (groundup.evaluate(averaged, device="cpu", weights=which) for which in ("trained", "ema"))
    assert plain["eval_loss"] != smooth["eval_loss"]
    groundup.export(averaged, tmp_path / "hf", format="hf", weights="ema")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["transformer.wte.weight"], files["wte.weight"])
    # What was exported is measured the same.
    groundup.import_model(tmp_path / "hf", tmp_path / "back")
    assert groundup.evaluate(tmp_path / "back", device="cpu", data=str(data))["eval_loss"] == smooth["eval_loss"]
    for which in ("trained", "ema"):
        done = groundup.generate(averaged, prompt="the", max_new_tokens=3, device="cpu", weights=which)
        assert len(done["completions"]) == 1
        assert groundup.score(averaged, text="the model", device="cpu", weights=which)["texts"]


def test_the_evaluations_of_a_run_are_those_of_the_command(data, tmp_path):
    groundup.train(data, tmp_path / "run", **AVERAGED | {"eval_steps": 6})
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    for which, key in (("trained", "eval_loss"), ("ema", "eval_ema_loss")):
        measured = groundup.evaluate(tmp_path / "run", device="cpu", bf16=False, weights=which)["eval_loss"]
        assert measured == pytest.approx(row[key], rel=1e-6)


def test_a_run_that_goes_on_has_the_same_average(data, tmp_path):
    options = AVERAGED | {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    groundup.train(data, tmp_path / "straight", **options)
    for steps in (5, 9, 12):
        groundup.train(data, tmp_path / "run", **options | {"max_steps": steps})
    names = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    found, expected = (contents(tmp_path / run / "checkpoint-12") for run in ("run", "straight"))
    assert [found[name] for name in names] == [expected[name] for name in names]


@pytest.mark.parametrize(("was", "now"), [(0.0, 0.9), (0.9, 0.0)], ids=["on", "off"])
def test_a_run_cannot_begin_or_cease_to_average(data, tmp_path, was, now):
    groundup.train(data, tmp_path / "run", **QUIET | {"ema_decay": was, "max_steps": 4})
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"resume checkpoint-4 with changed ema: (default → True|True → default); ") as error:
        groundup.train(data, tmp_path / "run", **QUIET | {"ema_decay": now})
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "run") == before


def test_the_decay_itself_may_change(data, tmp_path, capsys):
    groundup.train(data, tmp_path / "run", **QUIET | {"ema_decay": 0.9, "max_steps": 4})
    assert groundup.train(data, tmp_path / "run", **QUIET | {"ema_decay": 0.99})["steps"] == 12
    assert "changed since this run was started: ema_decay 0.9 → 0.99" in capsys.readouterr().err


def test_where_there_is_none_one_line_says_so(data, tmp_path):
    run = tmp_path / "run"
    groundup.train(data, run, **QUIET | {"max_steps": 2})
    for ask in (
        lambda: groundup.load(run, weights="ema"),
        lambda: groundup.evaluate(run, weights="ema", device="cpu"),
        lambda: groundup.generate(run, weights="ema", prompt="a", device="cpu"),
        lambda: groundup.export(run, tmp_path / "out", weights="ema"),
    ):
        with pytest.raises(CheckpointError, match="holds no averaged weights .* trained without --ema-decay") as error:
            ask()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_hold_none(averaged, tmp_path):
    groundup.export(averaged, tmp_path / "hf", format="hf")
    with pytest.raises(CheckpointError, match="only checkpoints of groundup hold averaged weights") as error:
        groundup.load(tmp_path / "hf", weights="ema")
    assert "\n" not in str(error.value)


def test_weights_of_no_such_kind_are_refused(averaged):
    with pytest.raises(ConfigError, match="weights: 'average' .* is not one of trained, ema"):
        groundup.load(averaged, weights="average")


@pytest.mark.parametrize("damage", ["shape", "name", "torn"])
def test_a_file_of_another_model_is_refused(averaged, tmp_path, damage):
    """Not by the checkpoint's own hashes, which are looked at before, but by itself."""
    like = load_file(averaged / "checkpoint-12" / "ema.safetensors")
    other = {"shape": like | {"ln_f.bias": torch.zeros(17)}, "name": {"x" + name: t for name, t in like.items()}, "torn": like}
    save_file(other[damage], tmp_path / "ema.safetensors")
    if damage == "torn":
        (tmp_path / "ema.safetensors").write_bytes((tmp_path / "ema.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not those of the model beside it|cannot be read") as error:
        load_average(tmp_path, like)
    assert "\n" not in str(error.value)


def test_the_first_update_forgets_most_of_the_initial_weights():
    """t = 1: d = 2/11, whatever the decay."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.9999)
    torch.nn.init.ones_(model.weight)
    average.update(model, 1)
    assert average.tensors["weight"].item() == pytest.approx(9 / 11)


def test_the_commands_take_it_and_say_so_in_one_line(averaged, data, tmp_path, capsys):
    def said(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        assert command([*map(str, arguments)]) == code
        found = capsys.readouterr()
        lines = [line for line in found.err.splitlines() if line.startswith("groundup:")]
        assert len(lines) == (1 if code else 0)
        return lines[0] if code else found.out

    done = json.loads(said("evaluate", averaged, "--weights", "ema", "--device", "cpu", "--json"))
    assert done["eval_loss"] == groundup.evaluate(averaged, device="cpu", weights="ema")["eval_loss"]
    assert done["checkpoint"] == str(checkpoints(averaged)[-1])
    said("export", averaged, tmp_path / "hf", "--weights", "ema")
    said("train", data, "--output-dir", tmp_path / "plain", *flags(QUIET | {"max_steps": 1}))
    for arguments in (("evaluate", tmp_path / "plain"), ("export", tmp_path / "plain", tmp_path / "other")):
        assert "holds no averaged weights" in said(*arguments, "--weights", "ema", code=4)
    words = said("generate", tmp_path / "hf", "--prompt", "a", "--weights", "ema", code=4)
    assert "only checkpoints of groundup hold averaged weights" in words
    assert "is not one of trained, ema" in said("evaluate", averaged, "--weights", "best", code=2)
