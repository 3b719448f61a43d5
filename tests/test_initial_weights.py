"""train --init-from and --freeze: what a run starts from, what of it may change, and that it goes on bit for bit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import groundup
from groundup.checkpoint.commit import checkpoints, commit
from groundup.config.presets import FINE_TUNING
from groundup.data.shards import open_dataset
from groundup.errors import CheckpointError, ConfigError, DataError
from groundup.model.gpt2 import GPT2Config
from groundup.model.loss import next_token_loss
from groundup.tokenizer.tokenizer import GPT2_PATTERN, Tokenizer, byte_tokenizer, load_tokenizer
from groundup.tokenizer.training import train_bpe
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, flags, make_text
from tests.test_cli_errors import left, refused
from tests.test_importing import Call, called, hugging_face_folder, train_small, weights_of
from tests.test_interop import assert_same_bits, logits_of, new_model
from tests.test_resume import assert_same_end, contents, ledger
from tests.test_state_dicts import GPTConfig, nano, nanogpt_checkpoint

pytestmark = pytest.mark.usefixtures("without_pictures")

# TINY without what the weights decide.
OWN = ("tokenizer", "n_layer", "n_head", "n_embd", "n_positions", "total_batch_tokens", "learning_rate")
TUNE: dict[str, Any] = {name: value for name, value in TINY.items() if name not in OWN} | {
    "total_batch_tokens": 128, "max_steps": 2, "eval_steps": 0, "save_steps": 0, "sample_tokens": 0,
}  # fmt: skip
BPE = {"tokenizer": "bpe", "vocab_size": 300}
SLOW = pytest.mark.slow


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *arguments: called(capsys, *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights others start from, with a tokenizer of its own."""
    return train_small(tmp_path_factory.mktemp("source"), **BPE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text than the source saw."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text(make_text(400, seed=3), encoding="utf-8")
    return path


def as_nanogpt(run: Path, target: Path) -> Path:
    """The weights as a state dict in nanoGPT's spelling, its settings beside it; it computes the exact GELU."""
    model = groundup.load(run).model
    config = model.config
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "vocab_size": config.vocab_size}
    torch.save(
        {
            "model": {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()},
            "model_args": sizes | {"block_size": config.n_positions, "bias": True, "dropout": 0.0},
        },
        target,
    )
    return target


@pytest.fixture(scope="module")
def sources(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in everybody's files."""
    place = tmp_path_factory.mktemp("sources")
    for form, name in (("hf", "hf"), ("gguf", "model.gguf"), ("openai-state-dict", "openai")):
        groundup.export(source, place / name, format=form)
    groundup.import_model(place / "hf", place / "imported")
    found = {"run": source, "checkpoint": source / "checkpoint-3"} | {path.name: path for path in place.iterdir()}
    return found | {"ckpt.pt": as_nanogpt(source, place / "ckpt.pt")}


def rows(run: Path, key: str) -> list[Any]:
    return [row[key] for row in read_rows(run / "metrics.jsonl") if key in row]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "model.safetensors")


@pytest.fixture(scope="module")
def finished(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a frozen embedding; tests work on copies of it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundup.recipes.train.draw_curves", lambda *arguments: None)
        groundup.train(text, run, init_from=str(source), freeze=["wte*"], **TUNE)
    return run


# ---- where it starts ----


@pytest.mark.parametrize("name", ["run", "checkpoint", "imported", "hf", "model.gguf", "openai", "ckpt.pt"])
def test_before_the_first_step_it_is_the_source(sources, source, text, tmp_path, name):
    """Its loss before training is that of the source on the same text; the tokenizer is the source's, and so is the shape."""
    tokenizer = {"tokenizer": str(source / "dataset")} if name == "ckpt.pt" else {}
    groundup.train(text, tmp_path / "run", init_from=str(sources[name]), **TUNE | {"eval_steps": 2} | tokenizer)
    path = sources[name]
    if name == "ckpt.pt":
        groundup.import_model(path, tmp_path / "in", **tokenizer)
        path = tmp_path / "in"
    expected = groundup.evaluate(path, data=str(tmp_path / "run" / "dataset"), device="cpu", bf16=False)["eval_loss"]
    losses = rows(tmp_path / "run", "eval_loss")
    assert losses[0] == pytest.approx(expected, abs=1e-6)
    assert losses[-1] != losses[0]
    if name != "ckpt.pt":
        direct = groundup.evaluate(source, data=str(tmp_path / "run" / "dataset"), device="cpu", bf16=False)["eval_loss"]
        assert losses[0] == pytest.approx(direct, abs=1e-6), "the same weights, whatever the format"
    config = groundup.load(tmp_path / "run").model.config
    assert config == groundup.load(path).model.config
    assert config.activation_function == ("gelu" if name == "ckpt.pt" else "gelu_new")
    used, theirs = open_dataset(tmp_path / "run" / "dataset").tokenizer, load_tokenizer(source / "dataset")
    assert used.vocab_size == 300
    assert used.gives_the_ids_of(theirs)


def test_fine_tuning_lowers_the_loss_within_ten_steps(source, text, tmp_path):
    options = TUNE | {"max_steps": 10, "eval_steps": 10, "learning_rate": 1e-3}
    groundup.train(text, tmp_path / "run", init_from=str(source), **options)
    first, last = rows(tmp_path / "run", "eval_loss")
    assert last < first - 0.05


def test_without_a_rate_the_weights_stay(source, text, tmp_path):
    """What is saved after a step of rate 0 is the source to the bit; weight decay is decoupled, so it does nothing either."""
    groundup.train(text, tmp_path / "run", init_from=str(source), learning_rate=0, **TUNE)
    assert_same_bits(weights_of(tmp_path / "run"), weights_of(source))


def test_dropout_is_the_new_runs_own(source, text, tmp_path):
    groundup.train(text, tmp_path / "run", init_from=str(source), resid_pdrop=0.5, **TUNE | {"max_steps": 1})
    groundup.train(text, tmp_path / "plain", init_from=str(source), **TUNE | {"max_steps": 1})
    assert groundup.load(tmp_path / "run").model.config.resid_pdrop == 0.5
    assert rows(tmp_path / "run", "loss") != rows(tmp_path / "plain", "loss"), "and it acts"


def test_a_model_with_a_head_of_its_own_keeps_it(text, tmp_path):
    config = GPT2Config(vocab_size=257, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=12, tie_word_embeddings=False)
    folder = hugging_face_folder(tmp_path / "theirs", new_model(config))
    groundup.train(text, tmp_path / "run", init_from=str(folder), learning_rate=0, **TUNE)
    assert groundup.load(tmp_path / "run").model.config == config
    assert_same_bits(weights_of(tmp_path / "run"), weights_of(folder))


def test_the_padding_of_a_vocabulary_is_cut(call, source, text, tmp_path):
    model = nano(GPTConfig(vocab_size=320))
    torch.save(nanogpt_checkpoint(model, vocab_size=320), tmp_path / "ckpt.pt")
    options = flags(TUNE | {"tokenizer": source / "dataset", "learning_rate": 0})
    done = call("train", text, "--init-from", tmp_path / "ckpt.pt", "--output-dir", tmp_path / "run", *options)
    assert done.code == 0, done.err
    found = weights_of(tmp_path / "run")["wte.weight"]
    assert torch.equal(found, model.transformer.wte.weight[:300])


# ---- context ----


@pytest.mark.parametrize("n_positions", [5, 16, 24, 40])
def test_a_context_is_cut_or_extended_by_copies(source, text, tmp_path, n_positions):
    original, seen = groundup.load(source).model, min(16, n_positions)
    ids = torch.randint(300, (3, seen), generator=torch.Generator().manual_seed(0))
    with groundup.open_training(text, tmp_path / "run", init_from=str(source), n_positions=n_positions, **TUNE) as training:
        model = training.model.eval()
        expected = torch.stack([original.wpe.weight[position % 16] for position in range(n_positions)])
        assert torch.equal(model.wpe.weight, expected)
        assert torch.equal(logits_of(model, ids), logits_of(original, ids))
        assert model.config.n_positions == n_positions
        assert next(iter(training)).tokens % n_positions == 0


@pytest.mark.parametrize(("n_positions", "words"), [(8, ["16 → 8", "cut off"]), (32, ["16 → 32", "NEW", "copies"])])
def test_another_context_is_said(call, source, text, tmp_path, n_positions, words):
    arguments = ("train", text, "--init-from", source, "--output-dir", tmp_path / "run", *flags(TUNE))
    done = call(*arguments, "--n-positions", n_positions)
    line = next(line for line in done.err.splitlines() if line.startswith("context:"))
    assert all(word in line for word in words)
    assert "context:" not in call(*arguments, "--output-dir", tmp_path / "same", "--n-positions", 16).err


# ---- going on ----


def cut_short(run: Path, steps: int) -> None:
    """As if the run had been stopped after so many steps."""
    for path in checkpoints(run):
        if int(path.name.removeprefix("checkpoint-")) > steps:
            shutil.rmtree(path)


LONG = TUNE | {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "save_total_limit": 0, "learning_rate": 1e-3}
WAYS = {
    "plain": {},
    "frozen": {"freeze": ["wte*", "h.0.*"]},
    "longer context": {"n_positions": 20},
    "dropout": {"resid_pdrop": 0.1, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_ends_as_the_straight_one(sources, text, tmp_path, way):
    """From either of its checkpoints; the second time the source is gone."""
    theirs = shutil.copytree(sources["hf"], tmp_path / "theirs")
    options = LONG | WAYS[way] | {"init_from": str(theirs)}
    groundup.train(text, tmp_path / "straight", **options)
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    for steps in (4, 2):
        cut_short(tmp_path / "run", steps)
        groundup.train(text, tmp_path / "run", **options)
        assert_same_end(tmp_path / "run", tmp_path / "straight")
        shutil.rmtree(theirs, ignore_errors=True)


def test_after_the_last_step_there_is_nothing_to_do_and_the_source_is_not_needed(call, text, source, tmp_path):
    theirs = shutil.copytree(source, tmp_path / "theirs")
    arguments = ("train", text, "--init-from", theirs, "--output-dir", tmp_path / "run", *flags(TUNE))
    assert call(*arguments).code == 0
    shutil.rmtree(theirs)
    before = contents(tmp_path / "run" / "checkpoint-2")
    done = call(*arguments)
    assert done.code == 0, done.err
    assert "already complete" in done.err
    assert contents(tmp_path / "run" / "checkpoint-2") == before


@pytest.mark.slow
def test_in_processes_of_their_own_too(sources, text, tmp_path):
    """The command line, twice: stopped by its own end, and gone on to another."""
    from tests.conftest import groundup as command

    def train(run: Path, steps: int) -> None:
        options = flags(LONG | {"max_steps": steps, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0})
        done = command("train", text, "--init-from", sources["model.gguf"], "--freeze", "wpe*", "--output-dir", run, *options)
        assert done.code == 0, done.err

    train(tmp_path / "straight", 6)
    train(tmp_path / "run", 4)
    train(tmp_path / "run", 6)
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (run / "checkpoint-6" / name for run in (tmp_path / "run", tmp_path / "straight"))
        assert first.read_bytes() == second.read_bytes()


def changed_state(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The newest checkpoint of a run with another trainer_state.json, whole and with a manifest that says so."""
    last = checkpoints(run)[-1]
    kept = {path.name: path.read_bytes() for path in last.iterdir() if path.name != "manifest.json"}
    state = json.loads(kept["trainer_state.json"])
    change(state)
    kept["trainer_state.json"] = json.dumps(state, indent=2).encode()

    def write(directory: Path) -> None:
        for name, content in kept.items():
            (directory / name).write_bytes(content)

    commit(run, int(last.name.removeprefix("checkpoint-")), write)


@pytest.mark.parametrize("init_from", [False, True])
def test_a_run_of_before_these_options_goes_on(source, text, tmp_path, init_from):
    """Its identity lacks them: they had their defaults."""
    tokenizer = {name: TINY[name] for name in OWN if name != "total_batch_tokens"}
    options = LONG | ({"init_from": str(source)} if init_from else tokenizer)
    groundup.train(text, tmp_path / "straight", **options)
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    cut_short(tmp_path / "run", 4)
    newer = ("tie_word_embeddings", "activation_function")

    def forget(state: dict[str, Any]) -> None:
        for name in newer:
            del state["identity"][name]

    changed_state(tmp_path / "run", forget)
    groundup.train(text, tmp_path / "run", **options)
    assert_same_end(tmp_path / "run", tmp_path / "straight")
    changed_state(tmp_path / "run", forget)
    if not init_from:
        with pytest.raises(ConfigError, match="activation_function: gelu_new → gelu"):
            groundup.train(text, tmp_path / "run", **options | {"activation_function": "gelu", "max_steps": 8})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freeze": []}, r"freeze: \['wte\*'\] → default"),
        ({"freeze": ["wpe*"]}, r"freeze: \['wte\*'\] → \['wpe\*'\]"),
        ({"n_positions": 8}, "n_positions: 16 → 8"),
        ({"seed": 7}, "seed: 42 → 7"),
    ],
)
def test_what_makes_it_another_run_is_refused(finished, source, text, tmp_path, change, words):
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    with pytest.raises(ConfigError, match=words):
        groundup.train(text, run, **TUNE | {"init_from": str(source), "freeze": ["wte*"], "max_steps": 4} | change)
    assert contents(run) == before


def test_other_weights_make_another_run(source, text, tmp_path):
    """Else its config.toml, and the card made of it, would name weights that it never saw."""
    groundup.train(text, tmp_path / "other", init_from=str(source), **TUNE)
    groundup.train(text, tmp_path / "run", init_from=str(source), **TUNE)
    for init_from in (str(tmp_path / "other"), ""):
        shape = {} if init_from else {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16}
        before = contents(tmp_path / "run")
        with pytest.raises(ConfigError, match="init_from"):
            groundup.train(
                tmp_path / "run" / "dataset", tmp_path / "run", **TUNE | {"max_steps": 4} | shape, init_from=init_from
            )
        assert contents(tmp_path / "run") == before
    options = {name: TINY[name] for name in ("tokenizer", "n_layer", "n_head", "n_embd", "n_positions")}
    groundup.train(text, tmp_path / "scratch", **TUNE | options)
    folder = hugging_face_folder(tmp_path / "theirs", groundup.load(tmp_path / "scratch").model)
    with pytest.raises(ConfigError, match="init_from"):
        groundup.train(tmp_path / "scratch" / "dataset", tmp_path / "scratch", init_from=str(folder), **TUNE | {"max_steps": 4})


def test_another_like_it_starts_from_its_config(call, source, text, tmp_path):
    arguments = ("--init-from", source, "--freeze", "wte*", "--freeze", "h.0.*", "--n-positions", 20)
    first = call("train", text, *arguments, "--output-dir", tmp_path / "first", *flags(LONG))
    assert first.code == 0, first.err
    again = call("train", "--config", tmp_path / "first" / "config.toml", "--output-dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert_same_end(tmp_path / "again", tmp_path / "first")
    assert (tmp_path / "again" / "config.toml").read_text().splitlines()[2:] == (
        (tmp_path / "first" / "config.toml").read_text().splitlines()[2:]
    )
    # A flag wins over the file: the shape stays, what else was asked for changes.
    other = call("train", "--config", tmp_path / "first/config.toml", "--output-dir", tmp_path / "o", "--learning-rate", "2e-3")
    assert other.code == 0, other.err
    assert rows(tmp_path / "o", "learning_rate")[-1] == pytest.approx(2 * rows(tmp_path / "first", "learning_rate")[-1])


def test_a_config_with_another_tokenizer_named_starts_another_like_it(call, source, text, tmp_path):
    """A state dict has no tokenizer: the one that was named is in the file too."""
    path = as_nanogpt(source, tmp_path / "ckpt.pt")
    named = ("--tokenizer", source / "dataset")
    first = call("train", text, "--init-from", path, *named, "--output-dir", tmp_path / "first", *flags(LONG))
    assert first.code == 0, first.err
    again = call("train", "--config", tmp_path / "first" / "config.toml", "--output-dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert_same_end(tmp_path / "again", tmp_path / "first")


# ---- frozen ----


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["wte*"], lambda name: name == "wte.weight"),
        (["wte.weight", "wpe.weight", "ln_f.*"], lambda name: name.startswith(("wte", "wpe", "ln_f"))),
        (["h.[0-0].*"], lambda name: name.startswith("h.0.")),
        pytest.param(["h.*.attn.*", "*.bias"], lambda name: ".attn." in name or name.endswith(".bias"), marks=SLOW),
        (["*.weight"], lambda name: name.endswith(".weight")),  # no matrix is left for weight decay
        (["*.bias", "*ln_*"], lambda name: name.endswith(".bias") or "ln_" in name),  # nothing but matrices is left
        pytest.param(["h.*", "ln_f.*", "wpe*"], lambda name: not name.startswith("wte"), marks=SLOW),
    ],
)
def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(source, text, tmp_path, patterns, frozen):
    groundup.train(text, tmp_path / "run", init_from=str(source), freeze=patterns, learning_rate=1e-3, **TUNE)
    before, after = weights_of(source), weights_of(tmp_path / "run")
    assert moved(before, after) == {name for name in before if not frozen(name)}
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors")
    assert {key.partition("/")[0] for key in saved} == {name for name in before if not frozen(name)}


@pytest.mark.parametrize("pattern", ["wte*", "h.1.*", *(pytest.param(name, marks=SLOW) for name in ("ln_f.weight", "*.bias"))])
def test_the_first_step_of_the_rest_is_that_of_a_run_with_nothing_frozen(source, text, tmp_path, pattern):
    """Without clipping, whose norm is of what is trained: the same gradients, so the same moments and the same weights."""
    options = TUNE | {"max_steps": 1, "max_grad_norm": 0, "learning_rate": 1e-3, "init_from": str(source)}
    groundup.train(text, tmp_path / "all", **options)
    groundup.train(text, tmp_path / "run", **options, freeze=[pattern])
    for name in ("optimizer.safetensors", "model.safetensors"):
        everything, rest = (load_file(tmp_path / run / "checkpoint-1" / name) for run in ("all", "run"))
        same = {key for key in rest if torch.equal(rest[key], everything[key])}
        if name == "optimizer.safetensors":
            assert same == set(rest)
            assert 0 < len(rest) < len(everything)
        else:
            assert (
                0
                < len(rest) - len(same)
                == len(load_file(tmp_path / "all/checkpoint-1/optimizer.safetensors")) // 3
                - (len(load_file(tmp_path / "run/checkpoint-1/optimizer.safetensors")) // 3)
            )


def test_a_frozen_tied_embedding_gets_no_gradient_from_the_head_either(source, text, tmp_path):
    with groundup.open_training(text, tmp_path / "run", init_from=str(source), freeze=["wte*"], **TUNE) as training:
        model = training.model
        ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
        next_token_loss(model(ids[:, :-1]), model.head_weight, ids[:, 1:]).backward()
        assert model.wte.weight.grad is None
        found = {name: parameter.grad for name, parameter in model.named_parameters() if name != "wte.weight"}
    reference = groundup.load(source).model
    logits = reference.logits(reference(ids[:, :-1])).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_random_weights_can_be_frozen_too(text, tmp_path):
    options = TINY | {"max_steps": 2, "eval_steps": 0, "sample_tokens": 0}
    with groundup.open_training(text, tmp_path / "untouched", **options) as training:
        before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    groundup.train(text, tmp_path / "run", **options, freeze="wpe*")
    assert moved(before, weights_of(tmp_path / "run")) == set(before) - {"wpe.weight"}


def test_what_is_frozen_is_said(call, source, text, tmp_path):
    options = flags(TUNE)
    done = call("train", text, "--init-from", source, "--freeze", "wte*", "--output-dir", tmp_path / "run", *options)
    assert f"frozen: 1 tensors, {300 * 32:,} of " in done.err
    assert "frozen:" not in call("train", text, "--init-from", source, "--output-dir", tmp_path / "plain", *options).err


@pytest.mark.parametrize(
    ("pattern", "words"), [("h.7.*", ["'h.7.*'", "matches no parameter", "wte.weight"]), ("*", ["matches every parameter"])]
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(call, source, text, tmp_path, pattern, words):
    done = call("train", text, "--init-from", source, "--freeze", pattern, "--output-dir", tmp_path / "run", *flags(TUNE))
    refused(done, 2, "freeze", "from --freeze", *words)


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def bpe(source: Path) -> Tokenizer:
    return load_tokenizer(source / "dataset")


def spelled(tokenizer: Tokenizer, *, indent: int | None, merges: str, order: str, extras: tuple[str, ...]) -> Tokenizer:
    """The same tokenizer as another program writes it."""
    spec = json.loads(tokenizer.json)
    model = spec["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [" ".join(pair) for pair in pairs] if merges == "text" else pairs
    if order == "reversed":
        model["vocab"] = dict(reversed(model["vocab"].items()))
        spec = dict(reversed(spec.items()))
    if "dropout" in extras:
        model["dropout"] = 0.0
    if "post_processor" in extras:
        spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    if "truncation" in extras:
        spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    if "use_regex" in extras:
        spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return Tokenizer(json.dumps(spec, indent=indent))


SPELLINGS = {
    "indent": st.sampled_from([None, 0, 2]),
    "merges": st.sampled_from(["text", "pairs"]),
    "order": st.sampled_from(["kept", "reversed"]),
    "extras": st.lists(st.sampled_from(["dropout", "post_processor", "truncation", "use_regex"]), unique=True).map(tuple),
}


@settings(max_examples=20, deadline=None)
@given(words=st.text(max_size=40), **SPELLINGS)
def test_a_tokenizer_is_the_same_however_it_is_spelled(bpe, words, **spelling):
    other = spelled(bpe, **spelling)
    assert other.gives_the_ids_of(bpe)
    assert bpe.gives_the_ids_of(other)
    for text in (words, make_text(50)):
        assert other.encode(text).tolist() == bpe.encode(text).tolist()


def test_gpt2s_pattern_written_out_is_gpt2s_pattern(bpe):
    spec = json.loads(bpe.json)
    split = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    other = Tokenizer(json.dumps(spec))
    assert other.encode(make_text(50)).tolist() == bpe.encode(make_text(50)).tolist()
    assert other.gives_the_ids_of(bpe)


def _swap(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _rename(spec: dict[str, Any]) -> None:
    """Two tokens change their ids."""
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


OTHERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "order of merges": _swap,
    "ids": _rename,
    "normalizer": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "dropout": lambda spec: spec["model"].update(dropout=0.5),
    "ignore_merges": lambda spec: spec["model"].update(ignore_merges=True),
    "end_of_word_suffix": lambda spec: spec["model"].update(end_of_word_suffix="e"),
    "pattern": lambda spec: spec["pre_tokenizer"].update(use_regex=False),
    "an added token": lambda spec: spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 300, "content": "the"}),
    "a token of ordinary text": lambda spec: spec["added_tokens"].append(
        spec["added_tokens"][0] | {"id": 300, "content": "learns", "special": False}
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_tokenizer_is_not_the_same(bpe, name):
    spec = json.loads(bpe.json)
    OTHERS[name](spec)
    other = Tokenizer(json.dumps(spec))
    # With one special token more it gives all the ids, and one that the other does not know.
    assert other.gives_the_ids_of(bpe) == (name == "an added token")
    assert not bpe.gives_the_ids_of(other)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 5), size=st.sampled_from([290, 300]), texts=st.lists(st.text(max_size=30), max_size=5))
@example(seed=0, size=300, texts=[])
def test_tokenizers_that_are_said_to_be_the_same_give_the_same_ids(bpe, seed, size, texts):
    other = train_bpe([make_text(300, seed=seed)], size)
    if other.gives_the_ids_of(bpe):
        for text in (*texts, make_text(200, seed=9)):
            assert other.encode(text).tolist() == bpe.encode(text).tolist()
    else:
        assert other.sha256 != bpe.sha256


def test_data_of_another_tokenizer_is_refused(call, source, text, tmp_path):
    groundup.prepare(text, tmp_path / "data", tokenizer="byte")
    done = call("train", tmp_path / "data", "--init-from", source, "--output-dir", tmp_path / "run", *flags(TUNE))
    refused(done, 2, tmp_path / "data", source, "another tokenizer", "257 and 300 ids")
    left(tmp_path, "data")


def test_data_of_the_same_tokenizer_in_another_spelling_is_used(call, source, bpe, text, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    other = spelled(bpe, indent=1, merges="text", order="reversed", extras=("post_processor", "use_regex"))
    other.save(tmp_path / "tokenizer")
    assert other.sha256 != bpe.sha256
    groundup.prepare(text, tmp_path / "data", tokenizer=str(tmp_path / "tokenizer"))
    arguments = ("train", tmp_path / "data", "--init-from", source, "--output-dir", tmp_path / "run", *flags(LONG))
    assert call(*arguments).code == 0
    plain = ("train", text, "--init-from", source, "--output-dir", tmp_path / "plain", *flags(LONG))
    assert call(*plain).code == 0
    assert ledger(tmp_path / "run") == ledger(tmp_path / "plain")
    cut_short(tmp_path / "run", 4)
    done = call(*arguments)
    assert done.code == 0, done.err
    assert ledger(tmp_path / "run") == ledger(tmp_path / "plain")


def test_tokens_of_nanogpts_files_are_taken_for_the_sources(call, tmp_path):
    """.bin files do not say their tokenizer; the weights do."""
    folder = hugging_face_folder(tmp_path / "theirs", new_model(GPT2Config(257, 8, 8, 1, 2)))
    data = tmp_path / "data"
    data.mkdir()
    draw = np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        draw.integers(0, 256, 2000).astype("<u2").tofile(data / name)
    done = call("train", data, "--init-from", folder, "--output-dir", tmp_path / "run", *flags(TUNE))
    assert done.code == 0, done.err
    assert groundup.load(tmp_path / "run").tokenizer.gives_the_ids_of(byte_tokenizer())


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_another_tokenizer_than_the_sources_is_refused(call, source, text, tmp_path, name):
    options = flags(TUNE | {"tokenizer": name})
    done = call("train", text, "--init-from", source, "--output-dir", tmp_path / "run", *options)
    refused(done, 2, f"'{name}'", "from --tokenizer", source, "leave --tokenizer out")
    left(tmp_path)


def test_the_sources_own_tokenizer_may_be_named(call, source, text, tmp_path):
    options = flags(TUNE | {"tokenizer": source / "dataset"})
    assert call("train", text, "--init-from", source, "--output-dir", tmp_path / "run", *options).code == 0


def test_weights_without_a_tokenizer_need_one_that_is_named(call, source, text, tmp_path):
    path = as_nanogpt(source, tmp_path / "ckpt.pt")
    arguments = ("train", text, "--init-from", path, "--output-dir", tmp_path / "run", *flags(TUNE))
    refused(call(*arguments), 2, path, "--tokenizer gpt2")
    # One that is made now, of other text, cannot be the one of the weights.
    refused(call(*arguments, "--tokenizer", "bpe", "--vocab-size", 300), 2, "bpe", path)
    refused(call(*arguments, "--tokenizer", tmp_path / "absent"), 3, tmp_path / "absent")
    left(tmp_path, "ckpt.pt")
    assert call(*arguments, "--tokenizer", source / "dataset").code == 0


def test_a_dataset_says_the_tokenizer_of_weights_without_one(call, source, tmp_path):
    path = as_nanogpt(source, tmp_path / "ckpt.pt")
    done = call("train", source / "dataset", "--init-from", path, "--output-dir", tmp_path / "run", *flags(TUNE))
    assert done.code == 0, done.err
    groundup.prepare(source.parent / "text.txt", tmp_path / "large", tokenizer="bpe", vocab_size=330)
    done = call("train", tmp_path / "large", "--init-from", path, "--output-dir", tmp_path / "other", *flags(TUNE))
    refused(done, 4, "ids", "300")


# ---- options ----


def test_a_shape_that_the_weights_do_not_have_is_refused_with_where_it_came_from(call, source, text, tmp_path):
    (tmp_path / "run.toml").write_text("n_embd = 64\n")
    done = call(
        "train", text, "--init-from", source, "--output-dir", tmp_path / "run", *flags(TUNE), "--config", tmp_path / "run.toml",
        "--n-layer", 5, "--activation-function", "gelu", "--no-tie-word-embeddings",
    )  # fmt: skip
    assert done.code == 2
    lines = done.error_lines
    assert len(lines) == 4
    for line, words in zip(
        lines,
        (
            f"n_layer: 5 (from --n-layer), but {source} has 2",
            f"n_embd: 64 (from file {tmp_path / 'run.toml'}), but {source} has 32",
            f"activation_function: gelu (from --activation-function), but {source} has gelu_new",
            f"tie_word_embeddings: False (from --tie-word-embeddings), but {source} has True",
        ),
        strict=True,
    ):
        assert words in line
    left(tmp_path, "run.toml")


def test_the_shape_of_the_weights_may_be_repeated(source, text, tmp_path):
    options = TUNE | {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "tie_word_embeddings": True}
    assert groundup.train(text, tmp_path / "run", init_from=str(source), **options)["steps"] == 2


@pytest.mark.parametrize("given", [{}, {"n_positions": 12}])
def test_heads_are_held_against_the_weights_not_against_a_preset(source, text, tmp_path, given):
    """Width 32 has never been asked for, so its default does not contradict 5 heads: the weights do."""
    with pytest.raises(ConfigError, match=r"n_head: 5 \(from argument n_head\), but .* has 2; leave it out"):
        groundup.train(text, tmp_path / "run", init_from=str(source), n_head=5, **TUNE | given)


def test_heads_that_a_file_does_not_say_are_given(source, text, tmp_path):
    model = groundup.load(source).model
    torch.save({f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "bare.pt")
    options = TUNE | {"tokenizer": str(source / "dataset"), "init_from": str(tmp_path / "bare.pt")}
    with pytest.raises(ConfigError, match="give --n-head"):
        groundup.train(text, tmp_path / "run", **options)
    for number, more in enumerate(({}, {"n_positions": 20})):
        groundup.train(text, tmp_path / str(number), **options, n_head=4, **more)
        assert groundup.load(tmp_path / str(number)).model.config.n_head == 4


def test_a_preset_beside_weights_is_refused(call, source, text, tmp_path):
    done = call("train", text, "--init-from", source, "--output-dir", tmp_path / "run", "--model", "gpt2", *flags(TUNE))
    refused(done, 2, "'gpt2' (from --model)", source, "leave --model out")
    left(tmp_path)


def test_the_defaults_are_for_fine_tuning_and_can_be_overridden(source, text, tmp_path):
    plain = {name: value for name, value in TUNE.items() if name != "total_batch_tokens"} | {"init_from": str(source)}
    with groundup.open_training(text, tmp_path / "run", **plain) as training:
        flat = training.settings.flat()
        assert {name: flat[name] for name in FINE_TUNING} == FINE_TUNING
        assert flat["learning_rate"] == 5e-5
        assert {training.settings.origins[name] for name in FINE_TUNING} == {"fine-tuning"}
        assert training.plan.tokens_per_step == 4096
        assert training.settings.origins["n_embd"] == str(source)
    with groundup.open_training(text, tmp_path / "other", **plain, learning_rate=1e-2, total_batch_tokens=64) as training:
        assert training.settings.flat()["learning_rate"] == 1e-2
        assert training.plan.tokens_per_step == 64


def test_the_global_batch_can_be_set_by_accumulation(source, text, tmp_path):
    """The batch of fine-tuning is nobody's wish, so the explicit one wins."""
    plain = {name: value for name, value in TUNE.items() if name != "total_batch_tokens"}
    options = plain | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    with groundup.open_training(text, tmp_path / "run", init_from=str(source), **options) as training:
        assert training.plan.tokens_per_step == 2 * 3 * 16


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stride": 17}, "stride: 17 .* is more than n_positions 16"),
        ({"total_batch_tokens": 15}, "total_batch_tokens: 15 .* less than one window of n_positions 16"),
        ({"n_positions": 400, "total_batch_tokens": 300}, "less than one window of n_positions 400"),
    ],
)
def test_rules_across_options_hold_for_the_shape_of_the_weights(source, text, tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        groundup.train(text, tmp_path / "run", init_from=str(source), **TUNE | given)


# ---- sources that cannot be used ----


def test_a_source_that_cannot_be_used_makes_no_run(source, text, tmp_path):
    damaged = shutil.copytree(source, tmp_path / "damaged")
    (damaged / "checkpoint-3" / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty", damaged, text):
        with pytest.raises(CheckpointError, match=str(path)):
            groundup.train(text, tmp_path / "run", init_from=str(path), **TUNE)
        assert not (tmp_path / "run").exists()


def test_a_context_longer_than_the_text_is_refused(source, text, tmp_path):
    with pytest.raises(DataError):
        groundup.train(text, tmp_path / "run", init_from=str(source), n_positions=4096, **TUNE | {"total_batch_tokens": 4096})
    assert checkpoints(tmp_path / "run") == []


def test_a_source_is_only_read(source, text, tmp_path):
    before = contents(source)
    groundup.train(text, tmp_path / "run", init_from=str(source), **TUNE)
    assert contents(source) == before


def test_the_card_of_a_fine_tuned_model_says_where_it_started(call, source, text, tmp_path):
    groundup.train(text, tmp_path / "run", init_from=str(source), **TUNE)
    assert call("export", tmp_path / "run", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"started from the weights of `{source}`" in card
    assert "random weights" not in card


def test_a_fine_tuned_model_can_be_fine_tuned(source, text, tmp_path):
    groundup.train(text, tmp_path / "one", init_from=str(source), n_positions=24, **TUNE)
    groundup.train(text, tmp_path / "two", init_from=str(tmp_path / "one"), learning_rate=0, **TUNE)
    assert_same_bits(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"))


def test_all_that_the_shape_is_made_of_comes_from_the_weights():
    """An option of the shape that is added one day must be taken, or be named here."""
    from groundup.recipes.initial import SHAPE

    own = {"vocab_size", "n_positions", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range"}
    assert {f.name for f in fields(GPT2Config)} - own == set(SHAPE)


def test_a_run_with_holes_from_weights_without_goes_on_by_the_same_command(text, tmp_path):
    """Its vocabulary has grown by special tokens: the option that said how large the text's was still holds."""
    base = TINY | {"tokenizer": "bpe", "vocab_size": 300, "max_steps": 2, "eval_steps": 0, "sample_tokens": 0}
    groundup.train(text, tmp_path / "base", **base)
    shape = ("n_layer", "n_head", "n_embd", "tokenizer")
    tuned = {name: value for name, value in base.items() if name not in shape}
    tuned |= {"init_from": str(tmp_path / "base"), "fim_rate": 0.5}
    groundup.train(text, tmp_path / "holes", **tuned)
    again = groundup.train(text, tmp_path / "holes", **tuned | {"max_steps": 4})
    assert again["steps"] == 4
    assert groundup.load(tmp_path / "holes").model.config.vocab_size == 305
