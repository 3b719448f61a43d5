"""Health measurements: against direct computation, with planted faults, and without a trace in the run."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from groundup.data.batches import Batch
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.loss import next_token_loss
from groundup.model.variants import build_gpt2
from groundup.training import health
from groundup.training.health import HealthProbe, largest_attention_logit

T, V = 16, 101
SMALL = GPT2Config(vocab_size=V, n_positions=T, n_embd=24, n_layer=3, n_head=3)
BLOCKS = ["h.0", "h.1", "h.2"]


def new_model(config: GPT2Config = SMALL) -> GPT2:
    model = GPT2(config)
    initialize(model, torch.Generator().manual_seed(0))
    return model


def batch_of(step: int, windows: int = 6, length: int = T) -> Batch:
    tokens = torch.randint(V, (windows, length + 1), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def backward(model: GPT2, batch: Batch, autocast=nullcontext) -> None:
    with autocast():
        loss = next_token_loss(model(batch.input_ids), model.head_weight, batch.labels) / batch.labels.numel()
    loss.backward()


def of_block(model: GPT2, block: str) -> list[torch.nn.Parameter]:
    """The parameters of a block, by module rather than by name."""
    return list(model.get_submodule(block).parameters())


def norm_of(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def inside(model: GPT2, input_ids: Tensor) -> list[dict[str, Tensor]]:
    """A forward pass in float64, written out: the residual stream, queries, keys and the MLP's units of each layer."""
    reference = new_model(model.config).double().eval()
    reference.load_state_dict(model.state_dict())
    x = reference.wte(input_ids) + reference.wpe(torch.arange(input_ids.size(1)))
    B, length, C = x.shape
    seen = []
    with torch.no_grad():
        for block in reference.h:
            heads = block.attn.n_head
            q, k, v = block.attn.c_attn(block.ln_1(x)).split(C, dim=-1)
            q, k, v = (part.view(B, length, heads, C // heads).transpose(1, 2) for part in (q, k, v))
            logits = q @ k.transpose(-2, -1) / math.sqrt(C // heads)
            logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            x = x + block.attn.c_proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, length, C))
            units = torch.nn.functional.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
            x = x + block.mlp.c_proj(units)
            seen.append({"logits": logits, "units": units, "x": x})
    return seen


@pytest.mark.parametrize(("autocast", "precision"), [(nullcontext, 1e-5), (bf16, 3e-2)], ids=["float32", "bf16"])
def test_the_values_are_those_of_direct_computation(autocast, precision):
    model, batch = new_model(), batch_of(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # initial logits are near 0 in every layer, where much looks alike
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    probe = HealthProbe(model)
    backward(model, batch, autocast)
    probe.gradients()
    probe.activations(batch.input_ids, autocast)
    gradients = {block: norm_of([p.grad for p in of_block(model, block)]) for block in ["wte", "wpe", *BLOCKS, "ln_f"]}
    weights = {block: norm_of(of_block(model, block)) for block in gradients}
    layers = inside(model, batch.input_ids[: health.WINDOWS])
    optimizer.step()
    probe.updates()
    found = probe.measured()

    assert tuple(found) == health.MEASUREMENTS
    assert found["grad_norm"] == pytest.approx(gradients, rel=1e-5)
    assert found["weight_norm"] == pytest.approx(weights, rel=1e-5)
    # Plain gradient descent: the update is the rate times the gradient.
    expected = {block: 0.5 * gradients[block] / weights[block] for block in gradients}
    assert found["update_ratio"] == pytest.approx(expected, rel=1e-4)
    expected = {block: float(layer["x"].square().mean().sqrt()) for block, layer in zip(BLOCKS, layers, strict=True)}
    assert found["activation_rms"] == pytest.approx(expected, rel=precision)
    assert max(expected.values()) > 1.5 * min(expected.values()), "layers differ, or a swap would pass"
    expected = {block: float(layer["logits"].max()) for block, layer in zip(BLOCKS, layers, strict=True)}
    assert found["attention_logit_max"] == pytest.approx(expected, rel=precision)
    if autocast is nullcontext:
        dead = [(layer["units"] <= 0).flatten(0, 1).all(0).double().mean() for layer in layers]
        assert found["dead_units"] == pytest.approx(dict(zip(BLOCKS, map(float, dead), strict=True)))


def test_planted_dead_units_are_found_where_they_are():
    model, batch = new_model(), batch_of(1)
    before = measured_inside(model, batch)["dead_units"]
    assert before["h.1"] < 0.1
    with torch.no_grad():
        model.h[1].mlp.c_fc.bias[: 96 // 4] = -50.0
    after = measured_inside(model, batch)["dead_units"]
    assert 0.25 <= after["h.1"] <= 0.25 + before["h.1"]
    assert after["h.0"] == before["h.0"]


def test_a_planted_huge_logit_is_found_where_it_is():
    """One head of the last layer attends with a large weight; its key comes before its query."""
    model, batch = new_model(), batch_of(1)
    assert max(measured_inside(model, batch)["attention_logit_max"].values()) < 1
    with torch.no_grad():
        bias = model.h[2].attn.c_attn.bias
        bias[8:16] = 30.0  # the second head's queries, then its keys
        bias[24 + 8 : 24 + 16] = 30.0
    found = measured_inside(model, batch)["attention_logit_max"]
    assert found["h.2"] == pytest.approx(30 * 30 * 8 / math.sqrt(8), rel=0.05)
    assert found["h.0"] < 1
    assert found["h.1"] < 1


@pytest.mark.parametrize("block", [1, 7, 64, 10**9])
def test_a_position_that_is_not_seen_does_not_count(block, monkeypatch):
    """The largest product by far is that of a query with a later key; also where rows are taken in blocks."""
    monkeypatch.setattr(health, "BLOCK_LOGITS", block)
    length, heads, width = 7, 2, 4
    projected = torch.randn(3, length, 3 * heads * width, generator=torch.Generator().manual_seed(1))
    q, k = projected.view(3, length, 3, heads, width)[:, :, :2].unbind(2)
    q[1, 2, 1], k[1, 5, 1] = 100.0, 100.0
    visible = [
        float(q[window, i, head].double() @ k[window, j, head].double()) / 2.0
        for window in range(3) for head in range(heads) for i in range(length) for j in range(i + 1)
    ]  # fmt: skip
    found = float(largest_attention_logit(projected, heads))
    assert found == pytest.approx(max(visible), rel=1e-6)
    assert found < 100 * 100 * 4 / 2
    # The same pair the other way round is seen.
    q[1, 5, 1] = 100.0
    assert float(largest_attention_logit(projected, heads)) == pytest.approx(100 * 100 * 4 / 2)


def measured_inside(model: GPT2, batch: Batch) -> dict[str, dict[str, float | None]]:
    probe = HealthProbe(model)
    probe.activations(batch.input_ids, nullcontext)
    return probe.measured()


@pytest.mark.parametrize("autocast", [nullcontext, bf16], ids=["float32", "bf16"])
def test_a_run_is_the_same_with_and_without(autocast):
    """Weights, moments and random numbers, with dropout, which would show a draw or a forgotten evaluation mode."""

    def run(*, look: bool) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        config = GPT2Config(vocab_size=V, n_positions=T, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.1, attn_pdrop=0.1)
        model = new_model(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        probe = HealthProbe(model)
        torch.manual_seed(3)
        model.train()
        for step in range(6):
            batch = batch_of(step)
            backward(model, batch, autocast)
            if look and step % 2:
                probe.gradients()
                probe.activations(batch.input_ids, autocast)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if look and step % 2:
                probe.updates()
                assert probe.measured()["update_ratio"]["h.1"] > 0
            optimizer.zero_grad(set_to_none=True)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return dict(model.state_dict()), moments, torch.get_rng_state()

    (weights, moments, drawn), (plain_weights, plain_moments, plain_drawn) = run(look=True), run(look=False)
    assert [name for name in weights if not torch.equal(weights[name], plain_weights[name])] == []
    assert all(torch.equal(one, other) for one, other in zip(moments, plain_moments, strict=True))
    assert torch.equal(drawn, plain_drawn)


@pytest.mark.parametrize("changes", [{"norm": "rms"}, {"norm": "batch"}, {"norm": "none"}, {"norm_position": "post"}], ids=str)
def test_a_variant_is_measured_and_left_as_it_is(changes):
    config = GPT2Config(vocab_size=V, n_positions=T, n_embd=24, n_layer=3, n_head=3, **changes)
    model, batch = build_gpt2(config), batch_of(1)
    initialize(model, torch.Generator().manual_seed(0))
    model.train()
    backward(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe = HealthProbe(model)
    probe.gradients()
    probe.activations(batch.input_ids, nullcontext)
    found = probe.measured()
    assert all(found[name].keys() == set(BLOCKS) for name in ("activation_rms", "attention_logit_max", "dead_units"))
    assert all(value > 0 for name in ("grad_norm", "activation_rms", "attention_logit_max") for value in found[name].values())
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []


class WithStatistics(torch.nn.Module):
    """A model of the same names whose blocks keep running statistics."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp, self.norm = torch.nn.Module(), torch.nn.Module(), torch.nn.BatchNorm1d(8)
            self.attn.c_attn, self.attn.n_head = torch.nn.Linear(8, 24), 2
            self.mlp.c_fc = torch.nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
            return x + self.attn.c_attn(x)[..., :8] + self.mlp.c_fc(x)[..., :8]

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(V, 8)
        self.h = torch.nn.ModuleList([self.Block(), self.Block()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return x


def test_running_statistics_and_modes_stay_as_they_are():
    model = WithStatistics()
    model.train()
    model.h[0].norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe = HealthProbe(model)
    probe.activations(batch_of(1).input_ids, nullcontext)
    assert probe.measured()["activation_rms"].keys() == {"h.0", "h.1"}
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert (model.training, model.h[0].norm.training, model.h[1].norm.training) == (True, False, True)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_pass_that_fails_leaves_the_model_as_it_was():
    model = new_model()
    model.train()
    with pytest.raises(IndexError):
        HealthProbe(model).activations(torch.full((1, T), V), nullcontext)
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_frozen_parameters_have_weights_and_neither_gradients_nor_updates():
    model, batch = new_model(), batch_of(1)
    model.wte.requires_grad_(False)
    model.h[0].mlp.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    probe = HealthProbe(model)
    backward(model, batch)
    probe.gradients()
    gradient = norm_of(
        [p.grad for p in of_block(model, "h.0.attn") + of_block(model, "h.0.ln_1") + of_block(model, "h.0.ln_2")]
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    probe.updates()
    found = probe.measured()
    assert "wte" not in found["grad_norm"].keys() | found["update_ratio"].keys()
    assert found["weight_norm"].keys() == {"wte", "wpe", "ln_f", *BLOCKS}
    assert found["grad_norm"]["h.0"] == pytest.approx(gradient, rel=1e-5)
    assert found["update_ratio"]["h.0"] == pytest.approx(gradient / found["weight_norm"]["h.0"], rel=1e-4)


def test_an_untied_head_is_a_block_of_its_own():
    model = new_model(GPT2Config(vocab_size=V, n_positions=T, n_embd=24, n_layer=1, n_head=3, tie_word_embeddings=False))
    backward(model, batch_of(1))
    probe = HealthProbe(model)
    probe.gradients()
    assert probe.measured()["grad_norm"].keys() == {"wte", "wpe", "h.0", "ln_f", "lm_head"}


def test_what_is_not_finite_is_none_and_the_rest_is_json():
    model, batch = new_model(), batch_of(1)
    backward(model, batch)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.grad[0, 0] = math.nan
        model.ln_f.weight.zero_()
        model.ln_f.bias.zero_()
    probe = HealthProbe(model)
    probe.gradients()
    probe.activations(batch.input_ids, nullcontext)
    probe.updates()
    found = probe.measured()
    assert found["grad_norm"]["h.1"] is None
    assert found["grad_norm"]["h.0"] > 0
    assert found["update_ratio"]["ln_f"] is None, "0 / 0"
    assert found["update_ratio"]["h.0"] == 0.0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_each_look_starts_anew():
    model, batch = new_model(), batch_of(1)
    probe = HealthProbe(model)
    backward(model, batch)
    probe.gradients()
    assert probe.measured()
    assert probe.measured() == {}
    probe.updates()
    assert probe.measured() == {}, "no update is measured without a look before it"


def test_few_windows_are_looked_at(monkeypatch):
    """However large the batch; and one at least, however long it is."""
    model, rows = new_model(), []
    model.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].size(0)))
    probe = HealthProbe(model)
    probe.activations(batch_of(1, windows=64).input_ids, nullcontext)
    monkeypatch.setattr(health, "LOOKED_AT_TOKENS", T // 2)
    probe.activations(batch_of(1, windows=64).input_ids, nullcontext)
    assert rows == [health.WINDOWS, 1]
