"""groundup import: every format in and out again to the bit, what is reported, what is refused, and what is left then."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import groundup
from groundup.checkpoint.commit import verify
from groundup.cli.main import run as run_command
from groundup.interop.huggingface import save_model
from groundup.interop.openai import write_openai
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.recipes import weights as weights_recipe
from groundup.tokenizer.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from tests.conftest import TINY, Finished, make_text
from tests.conftest import groundup as command
from tests.test_cli_errors import in_small_filesystem, left, refused
from tests.test_interop import assert_same_bits, new_model
from tests.test_state_dicts import GPTConfig, assert_same_logits, nano, nanogpt_checkpoint, rasbt

# 32 wide, so that q8_0 has whole blocks.
SMALL = TINY | {"n_embd": 32, "max_steps": 3, "eval_steps": 0, "save_steps": 0, "sample_tokens": 0}
BPE = {"tokenizer": "bpe", "vocab_size": 300}
CONFIG = GPT2Config(vocab_size=257, n_positions=8, n_embd=8, n_layer=2, n_head=2)
TEXTS = ["the model learns", "", "naïve 日本  \n\n\t x", "<|endoftext|> in a text", "\x00\x7f 1234 don't 'S"]
EXACT = [("hf", "f32"), ("gguf", "f32"), ("openai-state-dict", "f32")]
ROUNDED = [("hf", "f16"), ("hf", "bf16"), ("gguf", "f16"), ("gguf", "bf16"), ("gguf", "q8_0")]
Call = Callable[..., Finished]


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> Finished:
    """Run the command in this process, which has imported torch already."""
    capsys.readouterr()
    code = run_command([str(argument) for argument in arguments])
    return Finished(code, *capsys.readouterr())


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *arguments: called(capsys, *arguments)


def train_small(folder: Path, **options: Any) -> Path:
    """A run of three steps, without its pictures."""
    (folder / "text.txt").write_text(make_text(300), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundup.recipes.train.draw_curves", lambda *arguments: None)
        groundup.train(folder / "text.txt", folder / "run", **SMALL | options)
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each kind of tokenizer; nothing changes them."""
    return {
        "byte": train_small(tmp_path_factory.mktemp("byte")),
        "bpe": train_small(tmp_path_factory.mktemp("bpe"), **BPE),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder, as others have them."""
    return hugging_face_folder(tmp_path / "theirs")


def hugging_face_folder(folder: Path, model: GPT2 | None = None, tokenizer: Tokenizer | None = None) -> Path:
    folder.mkdir(parents=True)
    tokenizer = tokenizer or byte_tokenizer()
    save_model(model or new_model(CONFIG), folder, tokenizer.end_of_text_id)
    tokenizer.save(folder)
    return folder


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(groundup.load(path).model.state_dict())


def assert_same_tokenizer(first: Tokenizer, second: Tokenizer) -> None:
    for text in (*TEXTS, make_text(200)):
        assert first.encode(text).tolist() == second.encode(text).tolist()
    assert first.end_of_text_id == second.end_of_text_id
    assert first.gives_the_ids_of(second)


def exchanged(call: Call, source: Path, folder: Path, form: str, dtype: str) -> Path:
    """Exported and imported again, by the commands."""
    folder.mkdir()
    done = call("export", source, folder / "out", "--format", form, "--dtype", dtype, "--json")
    assert done.code == 0, done.err
    done = call("import", folder / "out", folder / "in", "--json")
    assert done.code == 0, done.err
    assert (done.json["missing"], done.json["unexpected"], done.json["reshaped"]) == ([], [], [])
    verify(folder / "in")
    return folder / "in"


# ---- in and out ----


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize(("form", "dtype"), EXACT)
def test_what_was_exported_is_imported_to_the_bit(call, runs, tmp_path, kind, form, dtype):
    ours = groundup.load(runs[kind])
    first = exchanged(call, runs[kind], tmp_path / "first", form, dtype)
    second = exchanged(call, first, tmp_path / "second", form, dtype)
    for path in (first, second):
        found = groundup.load(path)
        assert_same_bits(dict(found.model.state_dict()), dict(ours.model.state_dict()))
        assert found.model.config == ours.model.config
        assert_same_tokenizer(found.tokenizer, ours.tokenizer)
    assert load_file(first / "model.safetensors").keys() == load_file(runs[kind] / "checkpoint-3/model.safetensors").keys()


@pytest.mark.parametrize(("form", "dtype"), ROUNDED)
def test_from_the_first_import_on_a_rounded_model_stays_the_same(call, runs, tmp_path, form, dtype):
    kind = "bpe" if form == "gguf" else "byte"
    first = exchanged(call, runs[kind], tmp_path / "first", form, dtype)
    second = exchanged(call, first, tmp_path / "second", form, dtype)
    assert_same_bits(weights_of(second), weights_of(first))
    assert not torch.equal(weights_of(first)["wte.weight"], weights_of(runs[kind])["wte.weight"]), "it was rounded"
    assert_same_tokenizer(groundup.load(second).tokenizer, groundup.load(runs[kind]).tokenizer)


def test_a_model_goes_through_all_formats_and_comes_back(call, runs, tmp_path):
    path = runs["bpe"]
    for number, form in enumerate(("gguf", "openai-state-dict", "hf", "gguf")):
        path = exchanged(call, path, tmp_path / str(number), form, "f32")
    assert_same_bits(weights_of(path), weights_of(runs["bpe"]))
    assert_same_tokenizer(groundup.load(path).tokenizer, groundup.load(runs["bpe"]).tokenizer)


def test_an_import_is_a_checkpoint_of_ours(call, folder, tmp_path):
    assert call("import", folder, tmp_path / "in").code == 0
    verify(tmp_path / "in")
    refused(call("import", tmp_path / "in", tmp_path / "again"), 2, tmp_path / "in", "groundup's own already")
    damaged = tmp_path / "in" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x99")
    refused(call("generate", tmp_path / "in", "--prompt", "a"), 4, damaged, "damaged")


@pytest.mark.parametrize("name", ["checkpoint-5", "checkpoint-0", "model.v2", "日本"])
def test_whatever_its_folder_is_called_an_import_opens(call, folder, tmp_path, name):
    assert call("import", folder, tmp_path / name).code == 0
    assert_same_bits(weights_of(tmp_path / name), weights_of(folder))


def test_an_empty_folder_can_be_the_target(call, folder, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    assert call("import", folder, tmp_path / "in").code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert call("import", folder, ".").code == 0, "the folder where one stands, too"
    assert_same_bits(weights_of(tmp_path / "here"), weights_of(tmp_path / "in"))


def test_the_output_folder_of_hugging_faces_trainer_is_theirs(call, folder, tmp_path):
    """It holds the model, and beside it folders that are called like our checkpoints."""
    shutil.copytree(folder, folder / "checkpoint-500")
    done = call("import", folder, tmp_path / "in", "--json")
    assert done.code == 0, done.err
    assert done.json["format"] == "Hugging Face folder"
    assert call("generate", folder, "--prompt", "a", "--max-new-tokens", 2).code == 0
    assert call("import", folder / "checkpoint-500", tmp_path / "older").code == 0


def test_a_manifest_of_somebody_elses_does_not_make_a_folder_ours(call, folder, tmp_path):
    (folder / "manifest.json").write_text('{"name": "an app", "icons": []}')
    assert call("import", folder, tmp_path / "in").code == 0


# ---- files of weights alone ----


# 300 tokens, padded to 320 rows, as 50,257 are to 50,304.
PADDED = GPTConfig(vocab_size=320)


@pytest.fixture(scope="module")
def nano_model() -> Any:
    return nano(PADDED)


@pytest.fixture(scope="module")
def rasbt_model() -> Any:
    return rasbt(PADDED)


@pytest.fixture
def nano_file(nano_model: Any, tmp_path: Path) -> Path:
    """nanoGPT's file, which says its shape."""
    torch.save(nanogpt_checkpoint(nano_model, vocab_size=320), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


@pytest.fixture
def bare_file(rasbt_model: Any, tmp_path: Path) -> Path:
    """LLMs-from-scratch's: a state dict, and nothing else."""
    torch.save(rasbt_model.state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_the_padding_of_a_vocabulary_is_cut(call, runs, nano_file, nano_model, tmp_path):
    tokenizer = runs["bpe"] / "dataset"
    done = call("import", nano_file, tmp_path / "in", "--tokenizer", tokenizer, "--json")
    assert done.code == 0, done.err
    assert done.json["vocab_size"] == 300
    assert done.json["n_positions"] == 8
    assert done.json["format"] == "nanoGPT checkpoint"
    assert done.json["parameters"] == sum(tensor.numel() for tensor in weights_of(tmp_path / "in").values())
    assert "wte.weight (320, 12) → (300, 12)" in done.json["reshaped"][0]
    assert f"reshaped: {done.json['reshaped'][0]}" in done.err.splitlines()
    assert any("optimizer" in note for note in done.json["unexpected"])
    assert any("gelu" in note for note in done.json["missing"])
    found = groundup.load(tmp_path / "in")
    assert_same_tokenizer(found.tokenizer, load_tokenizer(tokenizer))
    assert_same_logits(found, nano_model)


def test_a_bare_state_dict_needs_its_heads_and_its_tokenizer(call, runs, bare_file, rasbt_model, tmp_path):
    named = ("--tokenizer", runs["bpe"] / "dataset")
    refused(call("import", bare_file, tmp_path / "in", *named), 2, bare_file, "give --n-head")
    refused(call("import", bare_file, tmp_path / "in", "--n-head", 2), 2, bare_file, "--tokenizer FILE", "320 ids")
    refused(call("import", bare_file, tmp_path / "in", "--n-head", 5, *named), 2, "n_head 5", "does not divide the width 12")
    left(tmp_path, "model.pth")
    done = call("import", bare_file, tmp_path / "in", "--n-head", 2, *named, "--json")
    assert done.code == 0, done.err
    assert done.json["format"] == "LLMs-from-scratch weights"
    assert len(done.json["reshaped"]) == 2, "the embedding and the head"
    assert_same_logits(groundup.load(tmp_path / "in"), rasbt_model)


def test_heads_that_contradict_the_file_are_refused(call, runs, nano_file, folder, tmp_path):
    """Whatever the format: what was asked for is not passed over in silence."""
    for form, path in (("gguf", tmp_path / "m.gguf"), ("openai-state-dict", tmp_path / "openai")):
        assert call("export", folder, path, "--format", form).code == 0
    for source in (nano_file, folder, tmp_path / "m.gguf", tmp_path / "openai"):
        named = ("--tokenizer", runs["bpe"] / "dataset") if source == nano_file else ()
        refused(call("import", source, tmp_path / "in", "--n-head", 4, *named), 2, "n_head", "4", "leave --n-head out")
        assert not (tmp_path / "in").exists()
        assert call("import", source, tmp_path / f"in-{source.name}", "--n-head", 2, *named).code == 0, "the same is none"


def test_a_tokenizer_of_another_size_is_refused(call, runs, tmp_path):
    """More ids than rows; or so many rows more that they are no padding."""
    for rows, ids in ((299, "300"), (300 + 1025, "300")):
        torch.save(nanogpt_checkpoint(nano(GPTConfig(vocab_size=rows)), vocab_size=rows), tmp_path / "ckpt.pt")
        done = call("import", tmp_path / "ckpt.pt", tmp_path / "in", "--tokenizer", runs["bpe"] / "dataset")
        refused(done, 4, f"{ids} ids", f"{rows:,}", "--tokenizer")
    left(tmp_path, "ckpt.pt")


def test_a_tokenizer_beside_the_models_own_must_be_the_same(call, runs, folder, tmp_path):
    refused(call("import", folder, tmp_path / "in", "--tokenizer", runs["bpe"] / "dataset"), 2, "from --tokenizer", folder)
    assert not (tmp_path / "in").exists()
    assert call("import", folder, tmp_path / "in", "--tokenizer", "byte").code == 0


def test_a_tokenizer_that_is_not_there_is_said_before_anything_is_read(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("groundup.recipes.importing.open_weights", None)
    refused(call("import", folder, tmp_path / "in", "--tokenizer", tmp_path / "absent"), 3, tmp_path / "absent")


# ---- the report ----


KEYS = {"format", "parameters", "vocab_size", "n_positions", "missing", "unexpected", "reshaped", "checkpoint"}


def test_the_report_of_a_plain_folder(call, folder, tmp_path):
    done = call("import", folder, tmp_path / "in", "--json")
    assert done.json == {
        "format": "Hugging Face folder", "parameters": 8 * (257 + 8) + 2 * 872 + 16, "vocab_size": 257, "n_positions": 8,
        "missing": [], "unexpected": [], "reshaped": [], "checkpoint": str(tmp_path / "in"),
    }  # fmt: skip
    assert done.err == ""


def test_the_report_for_people_names_the_next_step(call, folder, tmp_path):
    done = call("import", folder, tmp_path / "in")
    assert f"{tmp_path / 'in'}: Hugging Face folder, 3,880 parameters, vocabulary 257, context 8" in done.out
    assert f"groundup generate {tmp_path / 'in'}" in done.out
    assert f"--init-from {tmp_path / 'in'}" in done.out


def test_what_was_filled_and_left_out_is_listed(call, runs, tmp_path):
    """A model without biases, and a fork's settings: more notes than a screen holds are counted."""
    model = nano(GPTConfig(vocab_size=300), bias=False)
    torch.save(
        nanogpt_checkpoint(model, vocab_size=300, bias=False) | {f"note_{number}": 1 for number in range(12)},
        tmp_path / "c.pt",
    )
    done = call("import", tmp_path / "c.pt", tmp_path / "in", "--tokenizer", runs["bpe"] / "dataset", "--json")
    assert done.code == 0, done.err
    assert done.json.keys() == KEYS
    assert any("ln_f.bias: zeros" in note for note in done.json["missing"])
    assert len(done.json["unexpected"]) > 12
    said = [line for line in done.err.splitlines() if line.startswith("left out: ")]
    assert said[:10] == [f"left out: {note}" for note in done.json["unexpected"][:10]]
    assert said[10:] == [f"left out: and {len(done.json['unexpected']) - 10} more"]
    assert_same_logits(groundup.load(tmp_path / "in"), model)


def test_masks_and_heads_beside_the_model_are_listed(call, folder, tmp_path):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "v_head.weight": torch.ones(3)}, file)
    done = call("import", folder, tmp_path / "in", "--json")
    assert done.json["unexpected"] == ["1 × transformer.h.*.attn.bias", "v_head.weight"]
    assert "left out: v_head.weight" in call("generate", folder, "--prompt", "a", "--max-new-tokens", 2).err.splitlines()


def test_a_name_with_control_characters_does_not_reach_the_terminal(call, folder, tmp_path, monkeypatch):
    write = gguf.GGUFWriter.write_header_to_file

    def with_one_more(writer: Any, *rest: Any) -> None:
        writer.add_tensor("evil\x1b[31m\nred", np.ones(32, dtype=np.float32))
        write(writer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_one_more)
        assert call("export", folder, tmp_path / "m.gguf", "--format", "gguf").code == 0
    done = call("import", tmp_path / "m.gguf", tmp_path / "in", "--json")
    assert done.code == 0, done.err
    assert len(done.json["unexpected"]) == 1
    assert done.err.isascii()
    assert done.err.strip().isprintable(), "one line without control characters"


# ---- what is refused ----


def openai_folder(path: Path) -> Path:
    path.mkdir()
    write_openai(new_model(CONFIG), byte_tokenizer(), path)
    return path


def without(path: Path, name: str) -> Path:
    (path / name).unlink()
    return path


def with_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def llama(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 8, "architectures": ["LlamaForCausalLM"]})
    )
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}, path / "model.safetensors")
    return path


def without_tensor(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_smaller_vocabulary(folder: Path) -> Path:
    """Its tokenizer has an id more than the model knows."""
    shutil.rmtree(folder)
    return hugging_face_folder(folder, new_model(GPT2Config(**vars(CONFIG) | {"vocab_size": 256})))


def text_in(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("only text")
    return path


def half_a_download(name: str) -> Any:
    return pytest.param(lambda place: without(openai_folder(place / "x"), name), 4, (name,), id=f"without {name}")


WRONG = [
    pytest.param(lambda place: place / "absent", 4, ("absent", "not found", "a .gguf file"), id="nothing"),
    pytest.param(lambda place: "owner/name", 4, ("owner/name", "not found", "hf:owner/name"), id="a hub name"),
    pytest.param(lambda place: text_in(place / "x"), 4, ("x",), id="text"),
    pytest.param(lambda place: text_in(place / "x") / "notes.txt", 4, ("notes.txt", "neither"), id="a text file"),
    pytest.param(lambda place: llama(place / "x"), 4, ("x", "a llama model"), id="llama"),
    half_a_download("hparams.json"),
    half_a_download("model.ckpt.index"),
    half_a_download("model.ckpt.data-00000-of-00001"),
    half_a_download("encoder.json"),
    half_a_download("vocab.bpe"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "code", "words"), WRONG)
def test_a_wrong_source_is_one_line(call, tmp_path, make, code, words):
    place = tmp_path / "place"
    place.mkdir()
    refused(call("import", make(place), tmp_path / "in"), code, *words)
    left(tmp_path, "place")


@pytest.mark.parametrize("verb", ["import", "generate", "export"])
def test_an_empty_folder_is_told_what_would_be_accepted(call, tmp_path, verb):
    (tmp_path / "empty").mkdir()
    done = call(verb, tmp_path / "empty", *(() if verb == "generate" else (tmp_path / "out",)))
    refused(done, 4, tmp_path / "empty")
    assert "Errno" not in done.err
    assert "config.json" in done.err
    left(tmp_path, "empty")


BROKEN = [
    (without_tensor, 4, ("h.1.mlp.c_fc.weight", "missing")),
    (with_smaller_vocabulary, 4, ("257 ids", "256")),
    (lambda folder: with_config(folder, n_layer=3), 4, ("h.2.", "missing")),
    (lambda folder: with_config(folder, activation_function="relu"), 4, ("relu", "another model")),
    (lambda folder: without(folder, "model.safetensors"), 4, ("model.safetensors", "not found")),
    (lambda folder: without(folder, "tokenizer.json"), 2, ("holds none", "--tokenizer FILE", "257 ids")),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "code", "words"), BROKEN)
def test_a_broken_folder_is_one_line(call, folder, tmp_path, damage, code, words):
    damage(folder)
    refused(call("import", folder, tmp_path / "in"), code, folder, *words)
    left(tmp_path, "theirs")


def test_a_run_and_its_checkpoints_need_no_import(call, runs, tmp_path):
    for path in (runs["byte"], runs["byte"] / "checkpoint-3"):
        refused(call("import", path, tmp_path / "in"), 2, path, "groundup's own already")
    refused(call("import", runs["byte"] / "dataset", tmp_path / "in"), 4, runs["byte"] / "dataset")
    left(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path.cwd() / "exploded"),)


def test_a_pickle_that_would_run_something_is_refused_and_not_run(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, save in (("zip.pt", torch.save), ("bare.bin", lambda thing, path: path.write_bytes(pickle.dumps(thing)))):
        save({"model": {"transformer.wte.weight": torch.ones(2, 2)}, "note": Bomb()}, tmp_path / name)
        refused(call("import", tmp_path / name, "in", "--tokenizer", "byte"), 4, name)
    left(tmp_path, "zip.pt", "bare.bin")


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_target_where_something_is_is_left_alone(call, folder, tmp_path, verb):
    (tmp_path / "file").write_text("mine")
    text_in(tmp_path / "full")
    for target in (tmp_path / "file", tmp_path / "full", folder):
        refused(call(verb, folder, target), 2, target, "exists already")
    assert (tmp_path / "file").read_text() == "mine"
    left(tmp_path / "full", "notes.txt")


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_target_that_cannot_be_written_is_named(call, folder, tmp_path, verb):
    """Root may write anywhere, but not there. The advice names no option that the command does not have."""
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file" / "in", tmp_path / ("x" * 300), Path("/proc/in")):
        done = call(verb, folder, target)
        refused(done, 2, str(target.parent))
        assert "--output-dir" not in done.err
    left(tmp_path, "file", "theirs")


@pytest.mark.parametrize("verb", ["import", "generate", "evaluate", "score", "export"])
def test_a_source_with_a_name_that_is_too_long_is_one_line(call, tmp_path, verb):
    more = {"import": (tmp_path / "out",), "export": (tmp_path / "out",), "score": ("--text", "a")}.get(verb, ())
    refused(call(verb, "x" * 300, *more), 4, "x" * 300)


# ---- stopped on the way ----


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "No space left on device"), 6), (OSError(errno.EROFS, "Read-only"), 2), (KeyboardInterrupt(), 130)],
)
def test_an_import_that_fails_while_it_writes_leaves_nothing(call, folder, tmp_path, monkeypatch, error, code):
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", fail)
        done = call("import", folder, tmp_path / "in")
    assert done.code == code, done.err
    assert len(done.error_lines) == 1
    left(tmp_path, "theirs")
    assert call("import", folder, tmp_path / "in").code == 0


# Dies at the moment when everything but the tokenizer is written.
DIES = """
import os, signal, sys
from groundup.tokenizer.tokenizer import Tokenizer
Tokenizer.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from groundup.cli.main import run
run(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["import", "export"])
def test_killed_while_it_writes_nothing_has_the_final_name(call, folder, tmp_path, verb):
    died = subprocess.run([sys.executable, "-c", DIES, verb, folder, tmp_path / "out"], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert all(re.fullmatch(r"theirs|\.out\..*\.partial", path.name) for path in tmp_path.iterdir())
    assert call(verb, folder, tmp_path / "out").code == 0
    left(tmp_path, "theirs", "out")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
@pytest.mark.parametrize(
    "arguments", [("import",), ("export",), ("export", "--format=gguf"), ("export", "--format=openai-state-dict")]
)
def test_a_full_disk_leaves_nothing(folder, tmp_path, arguments):
    verb, *options = arguments
    result, listing = in_small_filesystem(tmp_path, 12, [verb, folder, tmp_path / "disk" / "out", *options])
    refused(result, 6, "no space left", tmp_path / "disk", "MiB free")
    assert listing == []


# ---- from elsewhere ----


def test_a_size_that_openai_did_not_release_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(call("import", "openai:999M", tmp_path / "in"), 2, "999M", "124M, 355M, 774M, 1558M")
    left(tmp_path)


OPENAI_FILES = (
    "encoder.json", "vocab.bpe", "hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt.meta",
    "model.ckpt.data-00000-of-00001",
)  # fmt: skip


def test_offline_openais_files_are_named_and_where_to_put_them(call, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = call("import", "openai:124M", tmp_path / "in", "--mirror", "http://127.0.0.1:1/")
    refused(done, 3, *OPENAI_FILES, tmp_path / "cache" / "groundup" / "gpt-2" / "124M", "127.0.0.1:1")
    assert not (tmp_path / "in").exists()


def test_openais_files_that_were_put_there_are_used_offline(call, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("groundup.interop.download.KNOWN_SHA256", {})  # a small one, in the place of OpenAI's
    place = tmp_path / "cache" / "groundup" / "gpt-2" / "124M"
    place.parent.mkdir(parents=True)
    openai_folder(place)
    (place / "model.ckpt.meta").write_bytes(b"a graph")
    done = call("import", "openai:124M", tmp_path / "in", "--mirror", "http://127.0.0.1:1/", "--json")
    assert done.code == 0, done.err
    assert done.json["format"] == "OpenAI checkpoint"
    assert_same_bits(weights_of(tmp_path / "in"), dict(new_model(CONFIG).state_dict()))
    done = call("generate", "openai:124M", "--prompt", "a", "--max-new-tokens", 2, "--json")
    assert done.json["checkpoint"] == "openai:124M"


def test_a_model_of_the_hub_is_asked_for_by_its_name(call, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    done = call("import", "hf:owner/name", tmp_path / "in")
    assert done.code == 0, done.err
    assert asked == ["owner/name"]
    assert_same_bits(weights_of(tmp_path / "in"), weights_of(folder))
    assert call("score", "hf:owner/name", "--text", "a").code == 0
    assert asked == ["owner/name"] * 2


def test_what_the_hub_says_is_one_line(call, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("404\n\nRepository not found\x1b[0m\n" + "x" * 1000)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    done = call("import", "hf:owner/name", tmp_path / "in")
    refused(done, 4, "hf:owner/name", "404 Repository not found", "config.json, model.safetensors and tokenizer.json")
    assert len(done.error_lines[0]) < 600
    assert "\x1b" not in done.err
    left(tmp_path)


def test_without_the_hubs_library_it_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(call("import", "hf:owner/name", tmp_path / "in"), 2, "pip install huggingface_hub")


def test_only_the_files_that_are_read_are_asked_for():
    """A repository also holds the weights of other libraries, several times the size."""
    assert not any(pattern.endswith((".h5", ".msgpack", ".onnx", "*")) for pattern in weights_recipe.HUB_FILES)
    assert {"config.json", "*.safetensors", "tokenizer.json", "merges.txt"} <= set(weights_recipe.HUB_FILES)


def test_a_model_of_the_hub_whose_weights_are_in_an_old_file_is_read(call, folder, tmp_path, monkeypatch):
    """Many a GPT-2 was never uploaded as safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    def fetch(name: str, allow_patterns: list[str], **_: object) -> str:
        fetched = tmp_path / "fetched"
        fetched.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, fetched)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    done = call("import", "hf:owner/name", tmp_path / "in")
    assert done.code == 0, done.err
    assert_same_bits(weights_of(tmp_path / "in"), weights_of(folder))


@pytest.mark.slow
def test_offline_the_hub_fails_fast(tmp_path):
    started = time.monotonic()
    done = command("import", "hf:owner/name", tmp_path / "in", env={
        "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "home"), "HTTPS_PROXY": "", "HTTP_PROXY": "",
    })  # fmt: skip
    refused(done, 4, "hf:owner/name", "cannot be fetched")
    assert time.monotonic() - started < 30
    assert not (tmp_path / "in").exists()


# ---- opened as they are ----


@pytest.fixture(scope="module")
def theirs(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bpe model in everybody's files."""
    place = tmp_path_factory.mktemp("theirs")
    for form, name in (("hf", "hf"), ("gguf", "model.gguf"), ("openai-state-dict", "openai")):
        groundup.export(runs["bpe"], place / name, format=form)
    return {path.stem: path for path in place.iterdir()}


@pytest.mark.parametrize("name", ["hf", "model", "openai"])
def test_every_command_opens_it_as_it_is(call, runs, theirs, name):
    """The same text, the same surprise and the same loss as of our own checkpoint, which holds the same numbers."""
    cpu = ("--device", "cpu", "--no-bf16", "--json")
    for arguments in (
        ("generate", "--prompt", "the model", "--max-new-tokens", 5),
        ("score", "--text", "the model learns naïve"),
        ("evaluate", "--data", runs["bpe"] / "dataset"),
        ("evaluate", "--data", runs["bpe"].parent / "text.txt"),
    ):
        verb, *options = arguments
        found, expected = (call(verb, path, *options, *cpu) for path in (theirs[name], runs["bpe"]))
        assert found.code == 0, found.err
        assert found.json.pop("checkpoint") == str(theirs[name])
        differing = {
            key
            for key, value in found.json.items()
            if key not in ("tokens_per_second", "checkpoint") and value != expected.json[key]
        }
        assert differing == set(), verb


@pytest.mark.parametrize("name", ["hf", "model", "openai"])
def test_a_model_of_no_run_must_be_told_its_data(call, runs, theirs, name):
    refused(call("evaluate", theirs[name]), 2, theirs[name], "give --data")
    done = call("evaluate", theirs[name], "--data", runs["byte"] / "dataset")
    refused(done, 2, runs["byte"] / "dataset", "another tokenizer")


@pytest.mark.parametrize("verb", ["generate", "score", "evaluate", "export"])
def test_weights_without_a_tokenizer_say_how_to_import_them(call, nano_file, bare_file, tmp_path, verb):
    more = {"score": ("--text", "a"), "export": (tmp_path / "out",)}.get(verb, ())
    refused(call(verb, nano_file, *more), 2, nano_file, f"groundup import {nano_file}", "--tokenizer")
    # These commands have no --n-head: it is for the import.
    refused(call(verb, bare_file, *more), 2, bare_file, "groundup import")


def test_a_folder_of_theirs_is_only_read(call, theirs):
    before = {path: path.stat().st_mtime_ns for path in theirs["hf"].iterdir()}
    assert call("generate", theirs["hf"], "--prompt", "a", "--max-new-tokens", 2).code == 0
    assert {path: path.stat().st_mtime_ns for path in theirs["hf"].iterdir()} == before
