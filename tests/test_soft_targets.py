"""What the loss is compared with besides labels: smoothed ones, and a teacher's predictions."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import groundup
from groundup.errors import CheckpointError, ConfigError
from groundup.interop.huggingface import save_model
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.loss import SoftTargets, next_token_loss
from groundup.recipes.teacher import open_teacher
from groundup.runtime.device import choose_machine
from groundup.tokenizer.tokenizer import Tokenizer, byte_tokenizer
from groundup.tokenizer.training import train_bpe
from groundup.tracking.metrics import METRICS, read_rows
from tests.conftest import TINY, flags, make_text
from tests.conftest import groundup as groundup_command
from tests.test_loss import SHAPES, block_logits, largest_in, problem, value_and_gradients

SHARES = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


def teacher_for(labels: Tensor, vocabulary: int, width: int, temperature: float, weight: float, seed: int = 1) -> SoftTargets:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*labels.shape, width, generator=draw, dtype=torch.float64)
    head = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    return SoftTargets(hidden, head, temperature, weight)


def plain(hidden: Tensor, head: Tensor, labels: Tensor, smoothing: float = 0.0, teacher: SoftTargets | None = None) -> Tensor:
    """
    The papers' sums, written out over all logits in float64.

    Szegedy et al. 2016, section 7: cross-entropy with q'(k) = (1 - ε) δ(k, y) + ε / K. Hinton et al. 2015, section 2: a
    weighted average of that and of the cross-entropy with the teacher's soft targets, the latter times T²; here less the
    teacher's own entropy, which no gradient sees, so that it is 0 where the student agrees.
    """
    logits = hidden.double() @ head.double().T  # (B, T, V)
    targets = F.one_hot(labels, head.size(0)).double() * (1 - smoothing) + smoothing / head.size(0)
    hard = -(targets * logits.log_softmax(-1)).sum()
    if teacher is None:
        return hard
    soft = (teacher.hidden.double() @ teacher.head_weight.double().T / teacher.temperature).softmax(-1)
    divergence = (soft * (soft.log() - (logits / teacher.temperature).log_softmax(-1))).sum()
    return (1 - teacher.weight) * hard + teacher.weight * teacher.temperature**2 * divergence


@settings(max_examples=80, deadline=None)
@given(
    shape=SHAPES, block=st.integers(1, 400), seed=st.integers(0, 9), smoothing=SHARES.filter(lambda share: share < 1),
    temperature=st.floats(0.5, 8), weight=SHARES, width=st.integers(1, 9), is_taught=st.booleans(),
)  # fmt: skip
def test_value_and_both_gradients_are_those_of_the_papers(shape, block, seed, smoothing, temperature, weight, width, is_taught):
    hidden, head, labels = problem(*shape, torch.float64, seed)
    teacher = teacher_for(labels, head.size(0), width, temperature, weight) if is_taught else None
    with block_logits(block):
        loss = next_token_loss(hidden, head, labels, label_smoothing=smoothing, teacher=teacher)
        found = value_and_gradients(loss / 3, hidden, head)
        with torch.no_grad():
            assert next_token_loss(hidden, head, labels, label_smoothing=smoothing, teacher=teacher) == loss
    expected = value_and_gradients(plain(hidden, head, labels, smoothing, teacher) / 3, hidden, head)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_smoothing_is_that_of_torch_and_of_the_option_that_it_is_named_after():
    from transformers.trainer_pt_utils import LabelSmoother

    hidden, head, labels = problem(3, 5, 7, 11, torch.float64)
    logits = hidden @ head.T
    with block_logits(30):
        loss = next_token_loss(hidden, head, labels, label_smoothing=0.1)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum")
    )
    theirs = LabelSmoother(epsilon=0.1)({"logits": logits}, labels) * labels.numel()
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0.0)  # it sums in float32


def test_nothing_asked_for_is_nothing_changed():
    """Bit for bit: a teacher without a share of the loss, and no smoothing."""
    hidden, head, labels = problem(3, 5, 7, 11, torch.float32)
    before = value_and_gradients(next_token_loss(hidden, head, labels), hidden, head)
    teacher = teacher_for(labels, 11, 4, 2.0, 0.0)
    for options in ({"label_smoothing": 0.0}, {"teacher": None}, {"teacher": teacher}, {"loss_scale": 1.0}):
        after = value_and_gradients(next_token_loss(hidden, head, labels, **options), hidden, head)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True)), options


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nothing_is_left_to_learn_from_a_teacher_that_agrees(temperature):
    hidden, head, labels = problem(2, 3, 4, 5, torch.float64)
    teacher = SoftTargets(hidden.detach(), head.detach(), temperature, 1.0)
    for value in value_and_gradients(next_token_loss(hidden, head, labels, teacher=teacher), hidden, head):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0.0, atol=1e-12)


def test_a_teacher_is_a_constant():
    hidden, head, labels = problem(2, 3, 4, 5, torch.float64)
    theirs = teacher_for(labels, 5, 3, 2.0, 0.5)
    theirs.hidden.requires_grad_()
    next_token_loss(hidden, head, labels, teacher=theirs).backward()
    assert theirs.hidden.grad is None


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_one_side_may_be_without_gradient(frozen):
    hidden, head, labels = problem(2, 3, 4, 5, torch.float64)
    teacher = teacher_for(labels, 5, 3, 2.0, 0.5)
    still, moving = (hidden, head) if frozen == "hidden" else (head, hidden)
    still.requires_grad_(False)
    (found,) = torch.autograd.grad(next_token_loss(hidden, head, labels, label_smoothing=0.2, teacher=teacher), moving)
    (expected,) = torch.autograd.grad(plain(hidden, head, labels, 0.2, teacher), moving)
    torch.testing.assert_close(found, expected)


def test_huge_logits_do_not_overflow():
    hidden, head, labels = problem(2, 3, 4, 5, torch.float32)
    teacher = teacher_for(labels, 5, 4, 2.0, 0.5)
    teacher = dataclasses.replace(teacher, hidden=teacher.hidden.float() * 1e4, head_weight=teacher.head_weight.float())
    loss = next_token_loss(hidden * 1e4, head, labels, label_smoothing=0.1, teacher=teacher)
    for value in value_and_gradients(loss, hidden, head):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_close(dtype):
    """Products in 16 bits, sums in float32; the gradients have the types of what they belong to."""
    hidden, head, labels = problem(4, 32, 64, 500, torch.float32)
    scaled = [t.detach().mul(0.2).requires_grad_() for t in (hidden, head)]
    teacher = teacher_for(labels, 500, 16, 2.0, 0.5)
    teacher = dataclasses.replace(teacher, hidden=teacher.hidden.float(), head_weight=teacher.head_weight.float() * 0.3)
    with block_logits(10 * 500), torch.autocast("cpu", dtype=dtype):
        found = value_and_gradients(next_token_loss(*scaled, labels, label_smoothing=0.1, teacher=teacher), *scaled)
    expected = value_and_gradients(plain(*scaled, labels, 0.1, teacher), *scaled)
    assert [t.dtype for t in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-3, atol=0.0)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_all_logits_are_never_formed_of_the_teacher_either():
    hidden, head, labels = problem(8, 64, 16, 1000, torch.float32)
    theirs = teacher_for(labels, 1000, 8, 2.0, 0.5)
    teacher = dataclasses.replace(theirs, hidden=theirs.hidden.float(), head_weight=theirs.head_weight.float())

    def taught(hidden, head, labels):
        return next_token_loss(hidden, head, labels, label_smoothing=0.1, teacher=teacher)

    block = 20_000
    with block_logits(block):
        assert largest_in(taught, hidden, head, labels) <= block


# The teacher itself, from files.


def saved_model(folder: Path, tokenizer: Tokenizer, **shape: float) -> GPT2:
    """A model with random weights, saved as a Hugging Face folder with its tokenizer."""
    config = GPT2Config(
        **{"vocab_size": tokenizer.vocab_size, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, **shape}
    )
    model = GPT2(config)
    initialize(model, torch.Generator().manual_seed(0))
    folder.mkdir()
    save_model(model, folder, tokenizer.end_of_text_id)
    tokenizer.save(folder)
    return model.eval()


def opened(source: Path, tokenizer: Tokenizer, n_positions: int = 16):
    said: list[str] = []
    teacher = open_teacher(str(source), tokenizer, n_positions, choose_machine("cpu", False), 3.0, 0.25, said.append)
    return teacher, said


def test_a_teacher_predicts_what_its_model_does_and_never_changes(tmp_path):
    model = saved_model(tmp_path / "teacher", byte_tokenizer(), resid_pdrop=0.5, attn_pdrop=0.5, n_positions=32)
    teacher, said = opened(tmp_path / "teacher", byte_tokenizer())
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    soft = teacher(ids)
    torch.testing.assert_close(soft.hidden @ soft.head_weight.T, model.logits(model(ids)))
    assert (soft.temperature, soft.weight) == (3.0, 0.25)
    assert not soft.hidden.requires_grad
    assert not soft.head_weight.requires_grad
    assert torch.equal(teacher(ids).hidden, soft.hidden), "no dropout"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(teacher(ids).hidden, soft.hidden), "in the precision of the step"
    (line,) = (line for line in said if line.startswith("teacher:"))
    assert str(tmp_path / "teacher") in line


def test_a_teacher_of_other_tokens_is_refused(tmp_path):
    bpe = train_bpe([make_text(400)], 300)
    saved_model(tmp_path / "teacher", bpe)
    with pytest.raises(ConfigError, match=r"^teacher: .*another tokenizer.*300 and 257 ids.*--tokenizer") as refusal:
        opened(tmp_path / "teacher", byte_tokenizer())
    assert "\n" not in str(refusal.value)
    with_more = bpe.with_special_tokens(["<|more|>"])
    with pytest.raises(ConfigError, match=r"^teacher: .*does not know <\|more\|>"):
        opened(tmp_path / "teacher", with_more)
    saved_model(tmp_path / "with more", with_more)
    with pytest.raises(ConfigError, match=r"^teacher: .*knows the special tokens <\|more\|>, which this run does not"):
        opened(tmp_path / "with more", bpe)


def test_a_teacher_that_predicts_ids_of_no_token_is_refused(tmp_path, monkeypatch):
    """Of other people's files the padding is cut off; a checkpoint of ours is taken as it is."""
    import groundup.recipes.teacher as module

    loaded = SimpleNamespace(model=GPT2(GPT2Config(260, 16, 8, 1, 2)), tokenizer=byte_tokenizer(), checkpoint=tmp_path)
    monkeypatch.setattr(module, "load_checkpoint", lambda *arguments: loaded)
    with pytest.raises(ConfigError, match=r"^teacher: .*predicts 260 ids.*257"):
        opened(tmp_path, byte_tokenizer())


def test_a_teacher_that_cannot_read_as_far_is_refused(tmp_path):
    saved_model(tmp_path / "teacher", byte_tokenizer())
    with pytest.raises(ConfigError, match=r"^teacher: .*context of 16 .* 17; give --n-positions 16"):
        opened(tmp_path / "teacher", byte_tokenizer(), n_positions=17)


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="^teacher: .*nowhere.*not found"):
        opened(tmp_path / "nowhere", byte_tokenizer())


@pytest.mark.slow
def test_a_student_comes_to_predict_what_its_teacher_does(tmp_path, text_file):
    """Even of a teacher whose mind is made up and has nothing to do with the text."""
    saved_model(tmp_path / "teacher", byte_tokenizer(), initializer_range=0.5)
    options = TINY | {"max_steps": 100, "eval_steps": 0, "save_steps": 0, "learning_rate": 1e-2}
    taught = options | {"teacher": tmp_path / "teacher", "teacher_weight": 1.0, "teacher_temperature": 1.0}
    said = groundup_command("train", text_file, "--output-dir", tmp_path / "student", *flags(taught))
    assert said.code == 0, said.err
    assert f"teacher: {tmp_path / 'teacher'}" in said.err
    groundup.train(text_file, tmp_path / "alone", **options)
    right, student, alone = (groundup.load(tmp_path / name).model for name in ("teacher", "student", "alone"))
    ids = torch.tensor([list(make_text(200, seed=5).encode()[: 32 * 16])]).view(32, 16)
    with torch.no_grad():
        target, found, other = (model.logits(model(ids)).log_softmax(-1) for model in (right, student, alone))
    distance, before, without = (
        float(F.kl_div(ours, target, log_target=True, reduction="sum")) / ids.numel()
        for ours in (found, torch.full_like(target, -math.log(257)), other)
    )
    assert distance < before / 3, "nearer than even guesses"
    assert distance < without / 3, "nearer than what the text alone teaches"
    rows = read_rows(tmp_path / "student" / METRICS)
    assert rows[-1]["loss"] == pytest.approx(distance, rel=0.3), "what is logged is what is learned from"
