"""Loss, perplexity, bits per byte and accuracy, by hand and against the run that logged them."""

import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import groundup
from groundup.data.batches import Batch, Windows, evaluation_batches, to_batch
from groundup.data.shards import open_dataset
from groundup.errors import CheckpointError, ConfigError
from groundup.evaluation.measure import byte_frequency_baseline, evaluate_model, evaluate_sources
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, make_text

pytestmark = pytest.mark.usefixtures("without_pictures")

CPU = torch.device("cpu")
CONFIG = GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
# Bytes of each id, as a tokenizer would have them; the last is end-of-text and has none.
BYTE_COUNTS = np.array([1, 2, 3, 1, 1, 4, 2, 1, 1, 1, 0])


def new_model() -> GPT2:
    model = GPT2(CONFIG)
    initialize(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    return model


def all_tokens(windows: int = 23) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 11, (windows, 9))


def batches(size: int, windows: int = 23) -> Iterator[Batch]:
    tokens = all_tokens(windows)
    for start in range(0, windows, size):
        yield to_batch(tokens[start : start + size], CPU)


def measure(given: Any, model: GPT2 | None = None, counts: np.ndarray = BYTE_COUNTS) -> Any:
    return evaluate_model(model or new_model(), given, counts, nullcontext)


def by_hand() -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of each token and whether it was the most likely, from plain logits in float64."""
    model, tokens = new_model().double().eval(), torch.from_numpy(all_tokens())
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1]))
    losses = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return losses.numpy(), (logits.argmax(-1) == tokens[:, 1:]).numpy()


def test_every_measure_by_hand():
    losses, hits = by_hand()
    found = measure(batches(5))
    assert found.tokens == 23 * 8
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found.perplexity == math.exp(found.loss)
    assert found.token_accuracy == hits.mean()
    assert 0 < found.token_accuracy < 1
    size = sum(int(BYTE_COUNTS[token]) for token in all_tokens()[:, 1:].ravel())
    assert found.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / size, rel=1e-5)


def test_each_source_is_measured_and_all_of_them_over_all_tokens():
    """23 windows, 4 of one source and 19 of the other: the total is no mean of means."""
    tokens = all_tokens()
    named = {"small": [to_batch(tokens[:4], CPU)], "large": [to_batch(tokens[4:14], CPU), to_batch(tokens[14:], CPU)]}
    found = evaluate_sources(new_model(), named, BYTE_COUNTS, nullcontext)
    losses, hits = by_hand()
    assert found is not None
    assert list(found.sources) == ["small", "large"]
    for name, rows in (("small", slice(0, 4)), ("large", slice(4, 23))):
        part = found.sources[name]
        size = sum(int(BYTE_COUNTS[token]) for token in tokens[rows, 1:].ravel())
        assert part.loss == pytest.approx(losses[rows].mean(), rel=1e-5)
        assert part.perplexity == math.exp(part.loss)
        assert part.token_accuracy == hits[rows].mean()
        assert part.bits_per_byte == pytest.approx(losses[rows].sum() / math.log(2) / size, rel=1e-5)
        assert (part.tokens, part.sources) == (losses[rows].size, {})
    straight = measure(batches(23))
    assert found.loss == pytest.approx(straight.loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(straight.bits_per_byte, rel=1e-6)
    assert (found.token_accuracy, found.tokens) == (straight.token_accuracy, straight.tokens)
    assert found.loss != pytest.approx(sum(part.loss for part in found.sources.values()) / 2, rel=1e-4)


def test_what_has_no_name_is_no_source():
    assert measure(batches(5)).sources == {}
    assert measure(batches(5)) == evaluate_sources(new_model(), {"": batches(5)}, BYTE_COUNTS, nullcontext)
    assert evaluate_sources(new_model(), {"a": batches(5), "b": batches(5)}, BYTE_COUNTS, nullcontext, lambda: True) is None


@pytest.mark.parametrize("size", [1, 2, 7, 22, 23, 100])
def test_nothing_depends_on_the_batch_size(size):
    """Means over tokens: a smaller last batch does not count more."""
    found, straight = measure(batches(size)), measure(batches(23))
    assert found.loss == pytest.approx(straight.loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(straight.bits_per_byte, rel=1e-6)
    assert (found.token_accuracy, found.tokens) == (straight.token_accuracy, straight.tokens)


def test_a_model_that_knows_nothing_has_the_loss_of_guessing():
    """All weights zero: every token has probability 1 / 11."""
    model = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = measure(batches(23), model, np.ones(11, dtype=np.int64))
    assert found.loss == pytest.approx(math.log(11), rel=1e-6)
    assert found.perplexity == pytest.approx(11, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(11), rel=1e-6)


def test_text_of_end_of_text_only_has_no_bytes():
    """No division by zero."""
    tokens = to_batch(np.full((2, 9), 10), CPU)
    assert math.isfinite(measure([tokens]).bits_per_byte)


def test_a_hopeless_loss_has_infinite_perplexity():
    model = new_model()
    with torch.no_grad():
        model.ln_f.weight.mul_(1e4)
    found = measure(batches(23), model)
    assert found.loss > 700
    assert found.perplexity == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found(training):
    """Dropout is off while it is measured, and on again after, also when it was given up or has failed."""
    model = GPT2(GPT2Config(**vars(CONFIG) | {"resid_pdrop": 0.5})).train(training)
    model.load_state_dict(new_model().state_dict())
    assert measure(batches(23), model) == measure(batches(23))
    assert model.training == training
    assert evaluate_model(model, batches(5), BYTE_COUNTS, nullcontext, lambda: True) is None
    assert model.training == training

    def failing() -> Iterator[Batch]:
        yield next(batches(5))
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - it has no message
        measure(failing(), model)
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


def test_it_is_given_up_between_batches_when_asked():
    asked: list[int] = []

    def after_two() -> bool:
        asked.append(1)
        return len(asked) > 2

    read: list[int] = []
    counted = (batch for index, batch in enumerate(batches(5)) if not read.append(index))  # type: ignore[func-returns-value]
    assert evaluate_model(new_model(), counted, BYTE_COUNTS, nullcontext, after_two) is None
    assert read == [0, 1, 2]


def test_byte_frequencies_by_hand():
    """'a' is seen 3 times, 'b' once; with one added to each of 256: (3 + 1) / 260 and (1 + 1) / 260."""
    bits = byte_frequency_baseline(np.array([0, 0, 0, 1]), np.array([0, 1, 1]), [b"a", b"b"])
    assert bits == pytest.approx(-(math.log2(4 / 260) + 2 * math.log2(2 / 260)) / 3)


def test_byte_frequencies_count_bytes_not_tokens():
    """'aab' as one token, or as three; end-of-text has no bytes."""
    one = byte_frequency_baseline(np.array([0, 1]), np.array([0, 1]), [b"aab", b""])
    three = byte_frequency_baseline(np.array([0, 0, 1]), np.array([0, 0, 1]), [b"a", b"b"])
    assert one == pytest.approx(three)


@settings(max_examples=30, deadline=None)
@given(train=st.binary(min_size=1, max_size=60), validation=st.binary(min_size=1, max_size=60))
def test_byte_frequencies_of_any_bytes(train, validation):
    table = [bytes([value]) for value in range(256)]
    found = byte_frequency_baseline(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), table)
    chances = [(train.count(byte) + 1) / (len(train) + 256) for byte in validation]
    assert found == pytest.approx(-sum(map(math.log2, chances)) / len(validation))


def test_no_text_has_no_bits():
    assert byte_frequency_baseline(np.array([0]), np.array([], dtype=np.int64), [b"a"]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "text.txt").write_text(make_text(), encoding="utf-8")
    groundup.train(folder / "text.txt", folder / "run", **TINY | {"max_eval_tokens": 0})
    return folder


def test_the_command_measures_what_the_run_logged_last(trained):
    last = [row for row in read_rows(trained / "run" / "metrics.jsonl") if "eval_loss" in row][-1]
    found = groundup.evaluate(trained / "run", device="cpu")
    assert found["eval_loss"] == last["eval_loss"]
    assert found["perplexity"] == last["eval_perplexity"]
    assert found["bits_per_byte"] == last["eval_bits_per_byte"]
    assert found["token_accuracy"] == last["eval_token_accuracy"]
    assert found["tokens"] == last["eval_tokens"]
    assert found["checkpoint"].endswith("checkpoint-12")


def test_a_checkpoint_or_other_batches_change_nothing(trained):
    run = trained / "run"
    whole = groundup.evaluate(run, device="cpu")
    single = groundup.evaluate(run / "checkpoint-12", device="cpu", per_device_eval_batch_size=1)
    assert single["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert single["tokens"] == whole["tokens"]
    assert groundup.evaluate(run / "checkpoint-8", device="cpu")["eval_loss"] != whole["eval_loss"]


def test_max_eval_tokens_measures_a_part_during_training(trained, tmp_path):
    groundup.train(
        trained / "text.txt", tmp_path / "run", **TINY | {"max_eval_tokens": 100, "max_steps": 1, "sample_tokens": 0}
    )
    tokens = {row["eval_tokens"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row}
    assert tokens == {96}  # 6 whole windows of 16


def test_other_text_is_measured_with_the_models_tokenizer(trained, tmp_path):
    """By hand: the loss over the windows of that text."""
    other = tmp_path / "other.txt"
    other.write_text(make_text(300, seed=5), encoding="utf-8")
    found = groundup.evaluate(trained / "run", device="cpu", data=str(other))
    groundup.prepare(tmp_path / "other.txt", tmp_path / "data", tokenizer="byte", validation_source=str(other))
    dataset, loaded = open_dataset(tmp_path / "data"), groundup.load(trained / "run")
    windows = Windows(dataset.stream("validation"), 16, 16)
    expected = evaluate_model(
        loaded.model, evaluation_batches(windows, 8, CPU), dataset.tokenizer.token_byte_counts, nullcontext
    )
    assert found["eval_loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["tokens"] == expected.tokens == 16 * len(windows)


def test_a_shorter_context_can_be_asked_for_and_a_longer_cannot(trained):
    short = groundup.evaluate(trained / "run", device="cpu", n_positions=4)
    whole = groundup.evaluate(trained / "run", device="cpu")
    assert short["tokens"] % 4 == 0
    assert short["eval_loss"] != whole["eval_loss"]
    with pytest.raises(ConfigError, match="n_positions: 17 is more than the model's 16"):
        groundup.evaluate(trained / "run", device="cpu", n_positions=17)


def test_a_dataset_of_another_tokenizer_is_refused(trained, tmp_path):
    groundup.prepare(trained / "text.txt", tmp_path / "data", tokenizer="bpe", vocab_size=300)
    with pytest.raises(ConfigError, match="another tokenizer"):
        groundup.evaluate(trained / "run", device="cpu", data=str(tmp_path / "data"))


def test_there_is_nothing_to_measure(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        groundup.evaluate(tmp_path / "nowhere")


# --- named sources ---


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one source of text and one that was prepared before."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "words.txt").write_text(make_text(1500), encoding="utf-8")
    (folder / "other.txt").write_text("0123456789 " * 300, encoding="utf-8")
    groundup.prepare(folder / "other.txt", folder / "digits", tokenizer="byte")
    sources = (f"words={folder / 'words.txt'}:3", f"digits={folder / 'digits'}:1")
    groundup.train([], folder / "run", source=sources, **TINY | {"max_eval_tokens": 0})
    return folder


def test_a_run_with_named_sources_is_measured_by_source(mixed):
    found = groundup.evaluate(mixed / "run", device="cpu")
    assert list(found["sources"]) == ["digits", "words"]
    parts = found["sources"].values()
    keys = {"eval_loss", "perplexity", "bits_per_byte", "token_accuracy", "tokens"}
    assert all(set(part) == keys for part in parts)
    assert found["tokens"] == sum(part["tokens"] for part in parts)
    assert found["eval_loss"] == pytest.approx(sum(p["eval_loss"] * p["tokens"] for p in parts) / found["tokens"])
    assert found["sources"]["digits"]["eval_loss"] != found["sources"]["words"]["eval_loss"]


def test_a_source_is_measured_as_if_it_were_alone(mixed):
    found = groundup.evaluate(mixed / "run", device="cpu")
    alone = groundup.evaluate(mixed / "run", device="cpu", data=str(mixed / "digits"))
    assert "sources" not in alone
    assert {key: alone[key] for key in found["sources"]["digits"]} == found["sources"]["digits"]


def test_the_command_measures_each_source_as_the_run_logged_it(mixed):
    last = [row for row in read_rows(mixed / "run" / "metrics.jsonl") if "eval_loss" in row][-1]
    found = groundup.evaluate(mixed / "run", device="cpu")
    assert found["eval_loss"] == last["eval_loss"]
    assert {name: part["eval_loss"] for name, part in found["sources"].items()} == {
        name: last[f"eval_{name}_loss"] for name in ("digits", "words")
    }


def test_the_text_of_a_mixture_may_be_gone_but_its_data_must_be_the_same(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    config = (run / "config.toml").read_text(encoding="utf-8")
    (run / "config.toml").write_text(config.replace(str(mixed), str(tmp_path / "copy")), encoding="utf-8")
    (tmp_path / "copy" / "words.txt").unlink()
    whole = groundup.evaluate(mixed / "run", device="cpu")
    assert groundup.evaluate(run, device="cpu")["sources"] == whole["sources"]
    shutil.rmtree(tmp_path / "copy" / "digits")
    groundup.prepare(mixed / "words.txt", tmp_path / "copy" / "digits", tokenizer="byte")
    with pytest.raises(ConfigError, match="has changed; give --data"):
        groundup.evaluate(run, device="cpu")
    shutil.rmtree(run / "dataset")
    with pytest.raises(ConfigError, match="the dataset of source words is gone"):
        groundup.evaluate(run, device="cpu")


def test_a_dataset_with_names_is_measured_by_source(trained, tmp_path):
    """Also by a model that was trained on something else."""
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.txt").write_text(make_text(600, seed=seed), encoding="utf-8")
    sources = tuple(f"{name}={tmp_path}/{name}.txt:1" for name in "ab")
    groundup.prepare([], tmp_path / "data", tokenizer="byte", source=sources)
    found = groundup.evaluate(trained / "run", device="cpu", data=str(tmp_path / "data"))
    assert list(found["sources"]) == ["a", "b"]
    assert found["tokens"] == sum(part["tokens"] for part in found["sources"].values())
