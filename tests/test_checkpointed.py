"""Activation checkpointing: the same numbers from less memory."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groundup.generation.generate import generate_tokens
from groundup.generation.sampling import Sampler
from groundup.interop.huggingface import load_model, save_model
from groundup.model.checkpointed import checkpoint_activations
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.loss import next_token_loss
from tests.test_variants import SMALL, VARIANTS, config_for, ids_for, moved


def both(config: GPT2Config = SMALL) -> tuple[GPT2, GPT2]:
    """A model that keeps its activations, and the same one that does not."""
    usual = moved(config).float().train()
    checkpointed = copy.deepcopy(usual)
    checkpoint_activations(checkpointed)
    return usual, checkpointed


def trained(model: GPT2, ids: Tensor) -> list[Tensor]:
    """Two passes, as accumulation makes them: the losses, the gradients, and the buffers that they leave."""
    torch.manual_seed(5)
    losses = []
    for part in ids.split(2):
        loss = next_token_loss(model(part), model.head_weight, part.roll(-1, 1))
        loss.backward()
        losses.append(loss.detach())
    # What is drawn next is the same too.
    return [*losses, *(p.grad for p in model.parameters()), *model.buffers(), torch.rand(3)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_same_bit_for_bit(variant, dropout):
    config = config_for(variant, resid_pdrop=dropout, attn_pdrop=dropout, embd_pdrop=dropout)
    ids = ids_for(SMALL, windows=3)
    for ours, expected in zip(*(trained(model, ids) for model in both(config)), strict=True):
        assert torch.equal(ours, expected)


def test_under_autocast_too():
    usual, checkpointed = both()
    ids = ids_for(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = trained(usual, ids), trained(checkpointed, ids)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def kept_numbers(model: GPT2, ids: Tensor) -> int:
    """How many numbers a forward pass keeps for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids)
    return sum(tensor.numel() for tensor in kept.values())


def test_each_block_keeps_one_tensor():
    ids = ids_for(SMALL)
    grown = {}
    for name, layers in (("few", 2), ("many", 6)):
        for kind, model in zip(("usual", "checkpointed"), both(replace(SMALL, n_layer=layers)), strict=True):
            grown[kind, name] = kept_numbers(model, ids)
    block = ids.numel() * SMALL.n_embd  # (B, T, C)
    assert grown["checkpointed", "many"] - grown["checkpointed", "few"] == 4 * block
    assert grown["usual", "many"] - grown["usual", "few"] > 4 * 10 * block


def test_names_and_files_are_the_same(tmp_path):
    usual, checkpointed = both()
    assert [name for name, _ in checkpointed.named_parameters()] == [name for name, _ in usual.named_parameters()]
    for name, model in (("usual", usual), ("checkpointed", checkpointed)):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name, end_of_text_id=0)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("usual", "checkpointed")]
    assert written[0] == written[1]
    assert torch.equal(load_model(tmp_path / "checkpointed")(ids_for(SMALL)), usual.eval()(ids_for(SMALL)))


def test_once_is_enough():
    _, checkpointed = both()
    kinds = [type(block) for block in checkpointed.h]
    checkpoint_activations(checkpointed)
    assert [type(block) for block in checkpointed.h] == kinds


@pytest.mark.parametrize("variant", ["layer-pre", "batch-post"])
def test_generation_is_not_concerned(variant):
    drawn = [
        list(
            generate_tokens(
                model, [[3], [1, 2, 3]], Sampler(temperature=1.0), seeds=[0, 1], max_new_tokens=12, end_of_text_id=-1
            )
        )
        for model in both(config_for(variant))
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 24
