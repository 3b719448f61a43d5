"""The step and the loop: accumulation, steps that are skipped, clipping, dropout."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import groundup
from groundup.checkpoint.commit import checkpoints, step_of, verify
from groundup.config.plan import micro_batches
from groundup.data.batches import Batch
from groundup.errors import DivergedError
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.loss import next_token_loss
from groundup.optim.optimizers import Optimizers, build_optimizer
from groundup.tracking.metrics import read_rows
from groundup.training.step import Learner, Update, train_step
from tests.conftest import TINY, flags, make_text
from tests.conftest import groundup as command

pytestmark = pytest.mark.usefixtures("without_pictures")

WINDOWS, LENGTH, VOCABULARY = 8, 16, 257
SMALL = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2)
QUIET = TINY | {"eval_steps": 0, "sample_tokens": 0}


def new_model(config: GPT2Config = SMALL, seed: int = 0) -> GPT2:
    model = GPT2(config)
    initialize(model, torch.Generator().manual_seed(seed))
    return model


ADAMW = {
    "optim": "adamw_torch_fused", "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1,
    "weight_decay_type": "decoupled", "sgd_momentum": 0.9, "muon_momentum": 0.95,
}  # fmt: skip


def optimizer_for(model: GPT2) -> Optimizers:
    return build_optimizer(model, **ADAMW)


def batch_of(step: int, windows: int = WINDOWS) -> Batch:
    tokens = torch.randint(VOCABULARY, (windows, LENGTH + 1), generator=torch.Generator().manual_seed(1000 + step))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def one_step(model: GPT2, optimizer: Optimizers, step: int = 1, *, micro: int = WINDOWS, batch: Batch | None = None,
             forward: Callable[[Tensor], Tensor] | None = None, **options: Any) -> Update:  # fmt: skip
    batch = batch or batch_of(step)
    passes = micro_batches(batch.labels.size(0), micro, 1, 0)
    settings = {"seed": 42, "step": step, "learning_rate": 1e-3, "max_grad_norm": 1.0} | options
    return train_step(Learner(model, forward or model, optimizer, nullcontext), batch, passes, **settings)


def weights(model: GPT2) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moments(model: GPT2, optimizer: Optimizers) -> dict[str, Tensor]:
    state = ((name, optimizer.state_of(p)) for name, p in model.named_parameters())
    return {f"{name}/{slot}": value.clone() for name, slots in state for slot, value in slots.items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("micro", [1, 3, 4, 8])
def test_accumulation_does_not_change_the_loss_curve(micro):
    """One pass of 8 windows, against 8 × 1, 3 + 3 + 2 and 2 × 4."""

    def curve(micro: int) -> list[float]:
        model = new_model()
        optimizer = optimizer_for(model)
        return [one_step(model, optimizer, step, micro=micro, batch=batch_of(step % 4)).loss for step in range(1, 21)]

    straight = curve(WINDOWS)
    assert straight[-1] < straight[0] - 0.1, "it learns, or equal curves would say little"
    assert curve(micro) == pytest.approx(straight, abs=1e-5)


def test_the_gradient_is_that_of_the_mean_over_the_global_batch():
    """Windows cut unevenly, against plain autograd over all of them at once."""
    model, reference = new_model(), new_model()
    norm = one_step(model, optimizer_for(model), micro=3, learning_rate=0.0).grad_norm
    batch = batch_of(1)
    loss = torch.nn.functional.cross_entropy(reference.logits(reference(batch.input_ids)).flatten(0, 1), batch.labels.flatten())
    loss.backward()
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in reference.parameters()))
    assert norm == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens():
    model = new_model()
    batch = batch_of(1)
    with torch.no_grad():
        expected = float(next_token_loss(model(batch.input_ids), model.head_weight, batch.labels)) / batch.labels.numel()
    assert one_step(model, optimizer_for(model), micro=3).loss == pytest.approx(expected, rel=1e-6)


def poisoned(model: GPT2, value: float) -> Callable[[Tensor], Tensor]:
    """The model, with one hidden state that is not a number, or infinite."""

    def forward(input_ids: Tensor) -> Tensor:
        hidden = model(input_ids)
        return hidden + torch.zeros_like(hidden).index_fill(0, torch.tensor([0]), value)

    return forward


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro", [2, 8])
def test_a_loss_that_is_not_finite_changes_nothing(value, micro):
    model = new_model()
    optimizer = optimizer_for(model)
    one_step(model, optimizer, 1)
    weights_before, moments_before = weights(model), moments(model, optimizer)
    update = one_step(model, optimizer, 2, micro=micro, forward=poisoned(model, value))
    assert update.skipped
    assert not math.isfinite(update.loss)
    assert_same_bits(weights(model), weights_before)
    assert_same_bits(moments(model, optimizer), moments_before)
    assert all(p.grad is None for p in model.parameters()), "nothing of it reaches the next step"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    """The loss is good; one element of one gradient is not."""
    model = new_model()
    optimizer = optimizer_for(model)
    one_step(model, optimizer, 1)
    weights_before, moments_before = weights(model), moments(model, optimizer)
    bias = model.h[1].mlp.c_fc.bias
    mask = torch.zeros_like(bias).index_fill(0, torch.tensor([3]), value)
    hook = bias.register_hook(lambda gradient: gradient + mask)
    update = one_step(model, optimizer, 2)
    hook.remove()
    assert update.skipped
    assert math.isfinite(update.loss)
    assert_same_bits(weights(model), weights_before)
    assert_same_bits(moments(model, optimizer), moments_before)


def test_a_first_step_that_is_skipped_leaves_no_trace():
    """The bad step comes before the optimizer has any state; the next one is as if it were the first."""
    skipping, straight = new_model(), new_model()
    first, second = optimizer_for(skipping), optimizer_for(straight)
    assert one_step(skipping, first, 1, forward=poisoned(skipping, math.nan)).skipped
    assert one_step(skipping, first, 2).loss == one_step(straight, second, 2).loss
    assert_same_bits(weights(skipping), weights(straight))
    assert_same_bits(moments(skipping, first), moments(straight, second))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Make the forward pass of chosen steps of a run give NaN."""

    def choose(is_bad: Callable[[int], bool]) -> None:
        real = train_step

        def step_with_poison(learner: Learner, *arguments: Any, step: int, **options: Any) -> Update:
            forward = poisoned(learner.model, math.nan) if is_bad(step) else learner.forward
            return real(replace(learner, forward=forward), *arguments, step=step, **options)

        monkeypatch.setattr("groundup.training.loop.train_step", step_with_poison)

    return choose


def test_skipped_steps_are_counted_said_and_survive_a_resume(text_file, tmp_path, poison, capsys):
    poison(lambda step: step in (3, 4, 7))
    summary = groundup.train(text_file, tmp_path / "run", **QUIET)
    assert summary["skipped_steps"] == 3
    assert summary["steps"] == 12
    assert capsys.readouterr().err.count("SKIPPED") == 3
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 4, 7]
    assert len({row["batch_digest"] for row in rows}) == 12, "a skipped step has used up its batch"
    again = groundup.train(text_file, tmp_path / "run", **QUIET | {"max_steps": 14})
    assert again["skipped_steps"] == 3


def test_too_many_in_a_row_stop_the_run(text_file, tmp_path, poison):
    """Three bad steps, one good, then bad for ever: the good one starts the count anew."""
    poison(lambda step: step in (1, 2, 3) or step >= 5)
    with pytest.raises(DivergedError, match="4 steps in a row up to step 8"):
        groundup.train(text_file, tmp_path / "run", **QUIET | {"max_skipped_steps": 4})
    newest = checkpoints(tmp_path / "run")[-1]
    verify(newest)
    assert step_of(newest) == 4, "while steps are skipped nothing is saved"
    assert all(torch.isfinite(p).all() for p in groundup.load(tmp_path / "run").model.parameters())


def test_resuming_after_a_skip_decides_as_a_straight_run_does(text_file, tmp_path, poison):
    """The count of bad steps in a row is in the checkpoint: a stop in the middle of them does not start it anew."""
    poison(lambda step: step in (3, 4, 5, 6))
    with pytest.raises(DivergedError, match="up to step 6"):
        groundup.train(text_file, tmp_path / "straight", **QUIET | {"max_skipped_steps": 4})
    groundup.train(text_file, tmp_path / "run", **QUIET | {"max_skipped_steps": 4, "max_steps": 4})
    with pytest.raises(DivergedError, match="up to step 6"):
        groundup.train(text_file, tmp_path / "run", **QUIET | {"max_skipped_steps": 4})


@pytest.mark.slow
def test_divergence_exits_5_and_the_last_checkpoint_is_good(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(make_text(300), encoding="utf-8")
    run = tmp_path / "run"
    good = command("train", text, "--output-dir", run, *flags(QUIET | {"max_steps": 4}), "--json")
    assert good.code == 0, good.err
    bad = command(
        "train", text, "--output-dir", run,
        *flags(QUIET | {"max_steps": 60, "learning_rate": 1e30, "warmup_steps": 0, "max_skipped_steps": 5}),
        "--json",
    )  # fmt: skip
    assert bad.code == 5, bad.err
    assert len(bad.error_lines) == 1
    assert "--learning-rate" in bad.error_lines[0]
    for path in checkpoints(run):
        verify(path)
    assert all(torch.isfinite(p).all() for p in groundup.load(run).model.parameters())


def test_weights_that_are_not_finite_are_never_saved(text_file, tmp_path):
    run = tmp_path / "run"
    with groundup.open_training(text_file, run, **QUIET) as training:
        next(iter(training))
        training.save()
        with torch.no_grad():
            training.model.h[0].mlp.c_fc.weight[1, 2] = math.nan
        training.state.step = 2
        with pytest.raises(DivergedError, match=r"h\.0\.mlp\.c_fc\.weight"):
            training.save()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-1"]
    verify(run / "checkpoint-1")


def sgd(model: GPT2) -> Optimizers:
    """Gradient descent: what it moves by is the gradient it was given, times the rate."""
    return Optimizers((torch.optim.SGD(model.parameters(), lr=1.0),))


def moved(model: GPT2, before: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((p.detach() - before[name]).double().square().sum()) for name, p in model.named_parameters()))


@pytest.mark.parametrize(("limit", "expected"), [(0.25, 0.25), (0.0, None), (1e6, None)], ids=["clipped", "off", "not reached"])
def test_clipping(limit, expected):
    """The norm is reported as it was before clipping, and the update has at most the limit's."""
    model = new_model()
    before = weights(model)
    norm = one_step(model, sgd(model), max_grad_norm=limit, learning_rate=1.0).grad_norm
    assert norm > 0.5, "or nothing would be clipped"
    assert moved(model, before) == pytest.approx(expected or norm, rel=1e-4)


def test_the_step_uses_the_learning_rate_it_is_given():
    model = new_model()
    before = weights(model)
    norm = one_step(model, sgd(model), max_grad_norm=0.0, learning_rate=0.125).grad_norm
    assert moved(model, before) == pytest.approx(0.125 * norm, rel=1e-4)


DROPPING = GPT2Config(**vars(SMALL) | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})


def loss_with_dropout(step: int = 1, seed: int = 42, micro: int = WINDOWS, batch: Batch | None = None) -> float:
    model = new_model(DROPPING)
    return one_step(model, optimizer_for(model), step, seed=seed, micro=micro, batch=batch or batch_of(0)).loss


def test_dropout_depends_on_seed_and_step_and_on_nothing_before():
    torch.manual_seed(1)
    first = loss_with_dropout()
    torch.manual_seed(2)
    torch.rand(100)
    assert loss_with_dropout() == first, "what was drawn before must not matter"
    assert loss_with_dropout(step=2) != first
    assert loss_with_dropout(seed=43) != first


def test_the_passes_of_a_step_have_masks_of_their_own():
    """The same window twice: in one pass or in two, the two copies must not be dropped alike."""
    window = batch_of(0, 1)
    twice = Batch(window.input_ids.repeat(2, 1), window.labels.repeat(2, 1))
    single, both = loss_with_dropout(micro=1, batch=window), loss_with_dropout(micro=1, batch=twice)
    assert both != pytest.approx(single, abs=1e-6)


def test_without_dropout_the_seed_does_not_matter():
    model, other = new_model(), new_model()
    assert one_step(model, optimizer_for(model), seed=1).loss == one_step(other, optimizer_for(other), seed=2).loss


def run_curve(text: Path, run: Path, **options: Any) -> Iterator[tuple[str, float]]:
    with groundup.open_training(text, run, **QUIET | options) as training:
        for step in training:
            yield step.batch_digest, step.loss


def test_a_run_reads_the_same_batches_and_learns_the_same_however_a_step_is_cut(text_file, tmp_path):
    straight = list(run_curve(text_file, tmp_path / "8", per_device_train_batch_size=8))
    for micro in (1, 3, 4):
        cut = list(run_curve(text_file, tmp_path / str(micro), per_device_train_batch_size=micro))
        assert [digest for digest, _ in cut] == [digest for digest, _ in straight]
        assert [loss for _, loss in cut] == pytest.approx([loss for _, loss in straight], abs=1e-5)


def test_gradient_accumulation_steps_is_another_way_to_say_the_global_batch(text_file, tmp_path):
    by_tokens = list(run_curve(text_file, tmp_path / "tokens", per_device_train_batch_size=4))
    without = {name: value for name, value in QUIET.items() if name != "total_batch_tokens"}
    with groundup.open_training(
        text_file, tmp_path / "steps", **without | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    ) as training:
        assert [(step.batch_digest, step.loss) for step in training] == by_tokens


def test_a_step_result_says_what_the_step_did(text_file, tmp_path):
    with groundup.open_training(text_file, tmp_path / "run", **QUIET | {"warmup_steps": 4}) as training:
        results = list(training)
        windows = training.plan.windows
    assert [result.step for result in results] == list(range(1, 13))
    assert all(result.tokens == 128 and result.seconds > 0 and not result.skipped for result in results)
    assert [result.learning_rate for result in results[:4]] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert [result.epoch for result in results] == pytest.approx([8 * step / windows for step in range(1, 13)])
    assert results[-1].loss < results[0].loss
