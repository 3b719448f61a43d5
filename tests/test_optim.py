"""Decay groups, and how many of a run's steps are warmup."""

import pytest

from groundup.config.options import BatchOptions, ModelOptions, RunOptions, ScheduleOptions
from groundup.config.plan import plan_run
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.optim.groups import block_matrices, decay_groups

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2)
BLOCK_MATRICES = {f"h.{i}.{name}.weight" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_every_parameter_is_in_exactly_one_group():
    model = GPT2(CONFIG)
    grouped = [id(p) for group in decay_groups(model.parameters(), 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(set(grouped)) == len(grouped)


def test_matrices_decay_and_nothing_else():
    model = GPT2(CONFIG)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = decay_groups(model.parameters(), 0.1)
    decaying, others = ([names[id(p)] for p in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert set(decaying) == {"wte.weight", "wpe.weight"} | BLOCK_MATRICES
    assert all(name.endswith("bias") or "ln_" in name for name in others)


def test_the_matrices_of_the_blocks_are_neither_embeddings_nor_head():
    model = GPT2(GPT2Config(**{**CONFIG.__dict__, "tie_word_embeddings": False}))
    names = {id(p): name for name, p in model.named_parameters()}
    blocks, rest = ({names[id(p)] for p in part} for part in block_matrices(model))
    assert blocks == BLOCK_MATRICES
    assert rest == set(names.values()) - blocks
    assert {"wte.weight", "wpe.weight", "lm_head.weight", "h.0.ln_1.weight"} <= rest


def test_what_is_frozen_is_in_no_group():
    model = GPT2(CONFIG)
    model.h[0].requires_grad_(False)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in decay_groups(model.parameters(), 0.1) for p in group["params"]} == trained
    assert {id(p) for part in block_matrices(model) for p in part} == trained


def planned(**options: float) -> tuple[int, int]:
    run = RunOptions(max_steps=int(options.get("max_steps", 0)), num_train_epochs=options.get("num_train_epochs", 3.0))
    schedule = ScheduleOptions(warmup_steps=options.get("warmup_steps", 0.05))
    plan = plan_run(ModelOptions(n_positions=10), BatchOptions(total_batch_tokens=100), schedule, run, windows=95)
    return plan.total_steps, plan.warmup_steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 200}, (200, 10)),
        ({"max_steps": 200, "warmup_steps": 7}, (200, 7)),
        ({"max_steps": 200, "warmup_steps": 0}, (200, 0)),
        ({"max_steps": 200, "warmup_steps": 0.5}, (200, 100)),
        ({"num_train_epochs": 2.0, "warmup_steps": 1}, (19, 1)),  # 190 windows, 10 a step
        ({"num_train_epochs": 0.01, "warmup_steps": 0}, (1, 0)),
    ],
    ids=str,
)
def test_warmup_in_steps_or_as_a_part_of_the_run(options, expected):
    assert planned(**options) == expected
