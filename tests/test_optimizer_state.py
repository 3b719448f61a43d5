"""Optimizer state as a file: training goes on to the last bit, and what is of another model or optimizer is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from groundup.checkpoint.optimizer import load_optimizer, save_optimizer
from groundup.errors import CheckpointError
from groundup.model.gpt2 import GPT2
from groundup.optim.optimizers import Optimizers
from tests.test_optimizers import ALL, CONFIG, EVERY, build, needs_muon, new_model, state, trained


def saved(model: nn.Module, optimizers: Optimizers, path: Path) -> Path:
    save_optimizer(optimizers.parts, model, path)
    return path


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_saved_optimizer_goes_on_to_the_last_bit(name, frozen, tmp_path):
    straight, resumed = new_model(), new_model()
    for model in (straight, resumed):
        model.h[0].requires_grad_(not frozen)
    optimizers = build(straight, **ALL[name])
    before = trained(straight, optimizers, range(1, 5))
    path = saved(straight, optimizers, tmp_path / "optimizer.safetensors")
    resumed.load_state_dict(before)
    fresh = build(resumed, **ALL[name])
    load_optimizer(fresh.parts, resumed, path)
    was, found = state(straight, optimizers), state(resumed, fresh)
    assert found.keys() == was.keys() == load_file(path).keys()
    assert bool(was) == ("without momentum" not in name)
    assert all(torch.equal(was[key], found[key]) and was[key].dtype == found[key].dtype for key in was)
    after, again = trained(straight, optimizers, range(5, 9)), trained(resumed, fresh, range(5, 9))
    assert all(torch.equal(after[key], again[key]) for key in after)
    assert not torch.equal(before["h.1.mlp.c_fc.weight"], after["h.1.mlp.c_fc.weight"])


@pytest.mark.parametrize(("name", "where"), [("adamw, fused", "meta"), ("adamw", "cpu"), ("adafactor", "cpu")])
def test_state_goes_to_the_models_device_and_the_step_where_torch_counts_it(name, where, tmp_path):
    """Fused kernels count on the device; elsewhere a count there would make every step wait for it."""
    model = new_model()
    optimizers = build(model, **ALL[name])
    trained(model, optimizers, range(1, 3))
    path = saved(model, optimizers, tmp_path / "optimizer.safetensors")
    elsewhere = GPT2(CONFIG).to("meta")
    fresh = build(elsewhere, **ALL[name])
    load_optimizer(fresh.parts, elsewhere, path)
    kept = fresh.state_of(elsewhere.wte.weight)
    assert {slot: value.device.type for slot, value in kept.items()} == dict.fromkeys(kept, "meta") | {"step": where}


@pytest.mark.parametrize("name", EVERY)
def test_before_the_first_update_there_is_nothing_to_save(name, tmp_path):
    model = new_model()
    path = saved(model, build(model, **ALL[name]), tmp_path / "optimizer.safetensors")
    assert load_file(path) == {}
    optimizers = build(model, **ALL[name])
    load_optimizer(optimizers.parts, model, path)
    assert state(model, optimizers) == {}


def test_a_slot_with_nothing_in_it_is_not_saved(tmp_path):
    """Torch has kept an empty momentum_buffer where there is no momentum."""
    model = new_model()
    optimizers = build(model, optim="sgd", sgd_momentum=0.0)
    optimizers.parts[0].state[model.wte.weight]["momentum_buffer"] = None
    assert load_file(saved(model, optimizers, tmp_path / "optimizer.safetensors")) == {}


def kept_shapes(name: str) -> dict[str, tuple[int, ...]]:
    model = new_model()
    optimizers = build(model, **ALL[name])
    trained(model, optimizers, range(1, 2))
    return {key: tuple(value.shape) for key, value in state(model, optimizers).items()}


def test_what_is_kept_of_a_matrix_and_of_a_bias():
    def kept(name: str, parameter: str) -> dict[str, tuple[int, ...]]:
        return {key.partition("/")[2]: shape for key, shape in kept_shapes(name).items() if key.startswith(f"{parameter}/")}

    matrix, bias = "h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias"
    assert kept("adamw, fused", matrix) == {"step": (), "exp_avg": (64, 16), "exp_avg_sq": (64, 16)}
    assert kept("adafactor", matrix) == {"step": (), "row_var": (64, 1), "col_var": (1, 16)}
    assert kept("adafactor", bias) == {"step": (), "variance": (64,)}
    assert kept("sgd", bias) == {"momentum_buffer": (64,)}
    if hasattr(torch.optim, "Muon"):
        assert kept("muon", matrix) == {"momentum_buffer": (64, 16)}
        assert kept("muon", bias) == {"step": (), "exp_avg": (64,), "exp_avg_sq": (64,)}


KEEPING = ["adamw, fused", "sgd", "adafactor", pytest.param("muon", marks=needs_muon)]


@pytest.mark.parametrize("of", KEEPING)
@pytest.mark.parametrize("into", [*KEEPING, "sgd without momentum"])
def test_the_state_of_another_optimizer_is_refused(of, into, tmp_path):
    model = new_model()
    optimizers = build(model, **ALL[of])
    trained(model, optimizers, range(1, 3))
    path = saved(model, optimizers, tmp_path / "optimizer.safetensors")
    other = build(model, **ALL[into])
    if of == into:
        load_optimizer(other.parts, model, path)
        return
    with pytest.raises(CheckpointError, match="is of another optimizer .* go on with the --optim"):
        load_optimizer(other.parts, model, path)


@pytest.mark.parametrize("name", KEEPING)
def test_a_tensor_that_is_missing_is_noticed_each_one(name, tmp_path):
    model = new_model()
    optimizers = build(model, **ALL[name])
    trained(model, optimizers, range(1, 3))
    tensors = load_file(saved(model, optimizers, tmp_path / "whole.safetensors"))
    for key in tensors:
        if key.partition("/")[0] in ("wte.weight", "h.1.mlp.c_fc.weight", "ln_f.bias"):
            path = tmp_path / "part.safetensors"
            save_file({other: value for other, value in tensors.items() if other != key}, path)
            with pytest.raises(CheckpointError, match=rf"lacks 1 tensors of the optimizer \(first: {key}\)"):
                load_optimizer(build(model, **ALL[name]).parts, model, path)


def wrong_shapes() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield "adamw, fused", "wte.weight/exp_avg", (31, 17)
    yield "adamw, fused", "wte.weight/exp_avg", ()
    yield "adamw, fused", "wte.weight/step", (31, 16)
    yield "adamw, fused", "no.such.weight/step", ()
    yield "adafactor", "wte.weight/row_var", (31, 16)
    yield "adafactor", "wte.weight/col_var", (16, 1)
    yield "sgd", "wte.weight/momentum_buffer", (16, 31)


@pytest.mark.parametrize(("name", "key", "shape"), list(wrong_shapes()), ids=str)
def test_state_of_another_model_is_refused(name, key, shape, tmp_path):
    model = new_model()
    optimizers = build(model, **ALL[name])
    trained(model, optimizers, range(1, 3))
    path = saved(model, optimizers, tmp_path / "optimizer.safetensors")
    save_file(load_file(path) | {key: torch.zeros(shape)}, path)
    with pytest.raises(CheckpointError, match="fits no parameter of this model"):
        load_optimizer(build(model, **ALL[name]).parts, model, path)


def test_a_file_that_is_none_is_refused(tmp_path):
    model = new_model()
    (tmp_path / "bad").write_bytes(b"not tensors")
    for name in ("bad", "absent"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_optimizer(build(model).parts, model, tmp_path / name)
