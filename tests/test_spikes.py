"""Spikes: when a step stands out, and what a person gets to read about it."""

import json
import math
import random
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groundup.data.batches import to_batch
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.recipes import spike_report
from groundup.recipes.spike_report import report_spike, window_losses, write_spike_report
from groundup.runtime.device import Machine
from groundup.tokenizer.tokenizer import byte_tokenizer
from groundup.training.loop import StepResult
from groundup.training.spikes import LEAST_VALUES, MAD_TO_STANDARD_DEVIATION, Deviation, Spike, judge

THRESHOLD, WINDOW = 8.0, 100
SPIKE = Spike(Deviation(7.5, 2.0, 40.0), Deviation(3.0, 1.0, 5.0), THRESHOLD, 100)


def noisy(values: list[float], scale: float, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [value + draw.gauss(0, scale) for value in values]


def alarms(losses: list[float], norms: list[float], threshold: float = THRESHOLD) -> list[int]:
    """The steps, from 0, that a run would take for spikes."""
    return [
        step for step, (loss, norm) in enumerate(zip(losses, norms, strict=True))
        if judge(losses[max(0, step - WINDOW) : step], norms[max(0, step - WINDOW) : step], loss, norm, threshold)
    ]  # fmt: skip


def test_the_score_is_the_formula():
    losses = [2.0, 2.2, 2.1, 1.9, 2.6] * 5
    norms = [1.0, 2.0, 0.5, 1.0, 4.0] * 5
    spike = judge(losses, norms, 5.0, 1.0, THRESHOLD)
    # Medians 2.1 and 1; deviations of the loss 0.1 0.1 0 0.2 0.5, of ln norm 0 ln2 ln2 0 2·ln2: medians 0.1 and ln 2.
    assert spike == Spike(
        loss=Deviation(5.0, 2.1, pytest.approx((5 - 2.1) / (1.4826 * 0.1 + 0.021))),
        grad_norm=Deviation(1.0, 1.0, 0.0),
        threshold=THRESHOLD,
        steps=25,
    )
    spike = judge(losses, norms, 2.0, 1e5, THRESHOLD)
    assert spike.grad_norm.score == pytest.approx(math.log(1e5) / (1.4826 * math.log(2) + 0.05))


def test_the_factor_makes_a_standard_deviation_of_normal_noise():
    assert pytest.approx(1 / NormalDist().inv_cdf(0.75), abs=1e-4) == MAD_TO_STANDARD_DEVIATION


def falling(steps: int = 1000) -> list[float]:
    """A loss curve as of a small model: from 5.6, steep, then slowly."""
    return [1.5 + 4.1 * (1 + step / 8) ** -0.7 for step in range(steps)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.03, 0.15])
def test_a_loss_that_falls_is_no_spike(noise, seed):
    """Nor is a norm that falls tenfold and then grows slowly, with noise that is skewed to the right."""
    draw = random.Random(seed)
    norms = [(6 * math.exp(-step / 10) + 0.6 + step / 800) * math.exp(draw.gauss(0, 0.2)) for step in range(1000)]
    assert alarms(noisy(falling(), noise, seed), norms) == []


@pytest.mark.parametrize("step", [200, 300, 999])
def test_a_planted_loss_is_found_and_nothing_else(step):
    losses, norms = noisy(falling(), 0.03), noisy([1.0] * 1000, 0.05)
    losses[step] += 2.0
    assert alarms(losses, norms) == [step]


@pytest.mark.parametrize("step", [LEAST_VALUES, 60, 999])
def test_a_planted_norm_is_found_and_nothing_else(step):
    """Early too, while the loss falls so fast that it tells little."""
    losses, norms = noisy(falling(), 0.03), noisy([1.0] * 1000, 0.05)
    norms[step] *= 4
    assert alarms(losses, norms) == [step]


def test_a_loss_that_falls_suddenly_is_no_spike():
    assert alarms([3.0] * 50 + [0.5], [1.0] * 51) == []
    assert alarms([3.0] * 51, [1.0] * 50 + [1e-6]) == []


def test_a_loss_that_stays_high_alarms_for_half_a_window():
    found = alarms(noisy([2.0] * 200 + [4.0] * 200, 0.02), noisy([1.0] * 400, 0.02))
    assert found == list(range(200, 200 + WINDOW // 2))


def test_where_there_is_no_noise_small_changes_are_none():
    quiet = [2.0] * 50
    assert alarms([*quiet, 2.1], [1.0] * 51) == []
    assert alarms([*quiet, 2.2], [1.0] * 51) == [50]
    assert alarms([*quiet, 2.0], [1.0] * 50 + [1.4]) == []
    assert alarms([*quiet, 2.0], [1.0] * 50 + [1.6]) == [50]


def test_few_steps_are_not_enough_and_zero_is_off():
    assert judge([2.0] * (LEAST_VALUES - 1), [1.0] * (LEAST_VALUES - 1), 1e6, 1e6, THRESHOLD) is None
    assert judge([2.0] * LEAST_VALUES, [1.0] * LEAST_VALUES, 1e6, 1e6, THRESHOLD)
    assert judge([2.0] * LEAST_VALUES, [1.0] * LEAST_VALUES, 1e6, 1e6, 0) is None
    assert judge([], [], 1.0, 1.0, THRESHOLD) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_is_another_matter(loss, norm):
    assert judge([2.0] * 50, [1.0] * 50, loss, norm, THRESHOLD) is None


NUMBERS = st.floats(0, 1e12)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=20, max_size=40), NUMBERS, NUMBERS, st.randoms())
def test_any_numbers_are_judged_and_json(before, loss, norm, draw):
    """Also zeros; the order of the steps before is of no importance, and nothing at or below their medians is a spike."""
    losses, norms = ([float(pair[i]) for pair in before] for i in (0, 1))
    spike = judge(losses, norms, loss, norm, THRESHOLD)
    shuffled = draw.sample(before, len(before))
    assert judge([a for a, _ in shuffled], [b for _, b in shuffled], loss, norm, THRESHOLD) == spike
    if loss <= sorted(losses)[len(losses) // 2 - 1] and norm <= sorted(norms)[len(norms) // 2 - 1]:
        assert spike is None
    if spike:
        assert json.loads(json.dumps(asdict(spike), allow_nan=False)) == asdict(spike)


def test_a_spike_says_what_stands_out():
    assert SPIKE.describe() == "loss 7.5 is 40.0 deviations above the median 2 of the last 100 steps (threshold 8)"
    both = replace(SPIKE, grad_norm=Deviation(30.0, 1.0, 17.25))
    assert "loss 7.5" in both.describe()
    assert "gradient norm 30 is 17.2 deviations above the median 1 of" in both.describe()


# The report.

TOKENIZER = byte_tokenizer()
LENGTH = 24


def windows_of(*texts: str) -> np.ndarray:
    """Each text as one window, filled up with spaces."""
    rows = [TOKENIZER.encode(text.ljust(LENGTH + 1)[: LENGTH + 1]).tolist()[: LENGTH + 1] for text in texts]
    return np.array(rows, dtype=np.int64)


def report(run: Path, windows: np.ndarray, losses: list[float] | None = None, **options: str) -> str:
    path = write_spike_report(run, 123, SPIKE, windows, TOKENIZER, losses, **{"digest": "abc123"} | options)
    assert path == run / "spikes" / "step-000123.txt"
    return path.read_text(encoding="utf-8")


def test_a_report_says_what_happened_and_shows_the_worst_window_first(tmp_path):
    text = report(tmp_path, windows_of("good text", "worst text", "better text"), [1.0, 9.0, 2.5], action="rolled back")
    head, *shown = text.split("--- window ")
    assert head.splitlines()[:5] == [
        "step 123: loss 7.5 is 40.0 deviations above the median 2 of the last 100 steps (threshold 8)",
        "loss: 7.5000 nats per token (median 2.0000, score 40.0)",
        "gradient norm: 3 (median 1, score 5.0)",
        "done about it: rolled back",
        "batch: 3 windows of 24 tokens, batch_digest abc123",
    ]
    assert [part.splitlines()[0] for part in shown] == ["2 of 3, loss 9.0000", "3 of 3, loss 2.5000", "1 of 3, loss 1.0000"]
    assert "| worst text" in shown[0]
    assert "left out" not in text


def test_without_losses_the_order_is_that_of_the_batch(tmp_path):
    text = report(tmp_path, torch.from_numpy(windows_of("first", "second")))
    assert text.index("first") < text.index("second")
    assert "loss " not in text.split("--- window", 1)[1]


def test_a_window_whose_loss_is_no_number_is_the_worst(tmp_path):
    text = report(tmp_path, windows_of("one", "two", "three"), [9.0, math.nan, 3.0])
    assert [int(number) for number in re.findall("--- window (\\d)", text)] == [2, 1, 3]


def test_texts_are_shown_and_not_obeyed(tmp_path):
    """Escape sequences, line breaks that would look like our own lines, bytes that are no text, ends of documents."""
    windows = windows_of("\x1b[31mred\x07\x00\n--- window 9", "a\r\nb\u0085c")
    windows[1, :3] = [TOKENIZER.end_of_text_id, 0xFF, TOKENIZER.end_of_text_id]
    content = report(tmp_path, windows)
    assert not set(content) & {chr(code) for code in [*range(32), *range(127, 160)]} - {"\n"}
    assert "| \ufffd[31mred\ufffd\ufffd\n| --- window 9" in content
    assert "<|endoftext|>\ufffd<|endoftext|>" in content
    assert len(re.findall("^--- window", content, re.MULTILINE)) == 2


def test_a_report_is_bounded_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(spike_report, "REPORTED_CHARACTERS", 10)
    windows = windows_of(*(f"text number {i}" for i in range(40)))
    text = report(tmp_path, windows, [float(i) for i in range(30)])
    assert re.findall("--- window (\\d+)", text) == [str(i + 1) for i in range(29, 29 - spike_report.REPORTED_WINDOWS, -1)]
    assert "30 of 40 windows measured" in text
    assert f"({40 - spike_report.REPORTED_WINDOWS} more windows are left out)" in text
    assert f"({LENGTH + 1 - 10} more characters of this window are left out)" in text


def test_the_same_report_is_one_file_and_another_one_of_that_step_has_its_own(tmp_path):
    first = write_spike_report(tmp_path, 5, SPIKE, windows_of("one"), TOKENIZER, digest="a")
    assert write_spike_report(tmp_path, 5, SPIKE, windows_of("one"), TOKENIZER, digest="a") == first
    second = write_spike_report(tmp_path, 5, SPIKE, windows_of("two"), TOKENIZER, digest="b")
    assert write_spike_report(tmp_path, 5, SPIKE, windows_of("two"), TOKENIZER, digest="b") == second
    assert [path.name for path in sorted((tmp_path / "spikes").iterdir())] == ["step-000005-2.txt", "step-000005.txt"]
    assert "one" in first.read_text()


@pytest.mark.parametrize("tokens", [1, 2 * LENGTH, 10**6])
def test_the_losses_of_windows_are_those_of_plain_cross_entropy(tokens, monkeypatch):
    """In passes of one window, of two, and at once; without dropout, and with the model left in training mode."""
    monkeypatch.setattr(spike_report, "PASS_TOKENS", tokens)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=257, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5))
    model.train()
    batch = to_batch(windows_of("a", "quite another text", "!" * 30), torch.device("cpu"))
    drawn = torch.get_rng_state()
    found = window_losses(model, batch, nullcontext)
    assert model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    model.eval()
    with torch.no_grad():
        logits = model.logits(model(batch.input_ids)).double()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none").mean(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    assert len({round(loss, 2) for loss in found}) == 3


def test_a_spike_is_read_again_and_measured(tmp_path, monkeypatch):
    """The samples at the positions of the step, and no others; the first ones measured."""
    monkeypatch.setattr(spike_report, "MEASURED_WINDOWS", 2)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=257, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2))
    texts = [f"window number {i} of all" for i in range(9)]

    class Texts:
        length = LENGTH

        def __len__(self) -> int:
            return len(texts)

        def read(self, positions: np.ndarray) -> np.ndarray:
            return windows_of(*(texts[position] for position in positions))

    step = StepResult(step=7, loss=7.5, grad_norm=3.0, learning_rate=0.1, tokens=72, seconds=0.1, epoch=0.1, skipped=False,
                      batch_digest="abc", positions=(4, 3), spike=SPIKE)  # fmt: skip
    machine = Machine(torch.device("cpu"), torch.float32, "cpu", "")
    text = report_spike(tmp_path, model, Texts(), TOKENIZER, step, machine).read_text()
    losses = window_losses(model, to_batch(windows_of(*texts[4:6]), machine.device), nullcontext)
    for number, loss in enumerate(losses):
        assert f"--- window {number + 1} of 3, loss {loss:.4f}\n| {texts[4 + number]}" in text
    assert "batch_digest abc" in text
    assert "(1 more windows are left out)" in text
    with pytest.raises(ValueError, match="step 7 is no spike"):
        report_spike(tmp_path, model, Texts(), TOKENIZER, replace(step, spike=None), machine)
