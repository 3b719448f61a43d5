"""Variants in files: ours hold them exactly, and nobody is handed one as a GPT-2."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import groundup
from groundup.checkpoint.commit import fill
from groundup.cli.main import run as run_command
from groundup.errors import CheckpointError
from groundup.interop.gguf_files import write_gguf
from groundup.interop.huggingface import load_model, read_config, read_hugging_face, save_model
from groundup.interop.openai import write_openai
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.recipes.loading import load_checkpoint
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.conftest import TINY, make_text
from tests.test_variants import VARIANTS, config_for, ids_for, moved

CONFIG = GPT2Config(vocab_size=257, n_positions=12, n_embd=16, n_layer=2, n_head=2)
OTHERS = [name for name in VARIANTS if name != "layer-pre"]


def model_of(variant: str) -> GPT2:
    model = moved(config_for(variant, CONFIG)).float()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(2**24 + 1)  # no float32 says this
    return model


def checkpoint_of(folder: Path, variant: str) -> Path:
    """As training writes it, without the trainer's state."""
    tokenizer = byte_tokenizer()

    def write(directory: Path) -> None:
        save_model(model_of(variant), directory, tokenizer.end_of_text_id)
        tokenizer.save(directory)

    fill(folder, 0, write)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_identity(tmp_path, variant):
    """Weights, running statistics and their count, and the configuration; through the commands' own door."""
    model, ids = model_of(variant), ids_for(CONFIG)
    found = load_checkpoint(checkpoint_of(tmp_path / "saved", variant), say=print).model
    assert found.config == model.config
    state, expected = found.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(tensor, expected[name]), name
    assert not found.training
    with torch.no_grad():
        assert torch.equal(found(ids), model(ids))


def test_a_gpt2_is_written_as_ever(tmp_path):
    save_model(model_of("layer-pre"), tmp_path, end_of_text_id=256)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert not {"norm", "norm_position"} & config.keys()


@pytest.mark.parametrize("variant", OTHERS)
def test_transformers_refuses_a_variant(tmp_path, variant):
    """By its own error about a type that it does not know."""
    import transformers

    checkpoint = checkpoint_of(tmp_path / "saved", variant)
    for opened in (transformers.AutoModelForCausalLM, transformers.AutoConfig):
        with pytest.raises(ValueError, match="model type `groundup_gpt2` but Transformers does not recognize"):
            opened.from_pretrained(checkpoint)


@pytest.mark.parametrize("form", ["hf", "gguf", "openai-state-dict"])
@pytest.mark.parametrize("variant", OTHERS)
def test_a_variant_is_not_exported(tmp_path, capsys, variant, form):
    checkpoint = checkpoint_of(tmp_path / "saved", variant)
    norm, position = variant.split("-")
    code = run_command(["export", str(checkpoint), str(tmp_path / "out"), "--format", form])
    out, err = capsys.readouterr()
    assert (code, out) == (4, "")
    line = err.splitlines()[-1]
    assert f"this model has norm {norm} and norm_position {position}, which {form} cannot express" in line
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_nor_by_the_writers_themselves(tmp_path):
    model = model_of("rms-pre")
    with pytest.raises(CheckpointError, match="GGUF cannot express"):
        write_gguf(model, byte_tokenizer(), tmp_path / "model.gguf", "f32", "model")
    with pytest.raises(CheckpointError, match="openai-state-dict cannot express"):
        write_openai(model, byte_tokenizer(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["rms-pre", "layer-post", "batch-pre"])
def test_a_variants_folder_is_not_imported(tmp_path, capsys, variant):
    """Without its manifest a checkpoint is somebody's folder; a variant is read from a checkpoint of ours only."""
    checkpoint = checkpoint_of(tmp_path / "saved", variant)
    (checkpoint / "manifest.json").unlink()
    assert run_command(["import", str(checkpoint), str(tmp_path / "in")]) == 4
    assert "is a variant of GPT-2 that groundup trained" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(CheckpointError, match=r"give the whole checkpoint or its run, with its manifest\.json"):
        read_hugging_face(checkpoint)


# Config.json by hand: the change, and what is said.
WRONG = [
    ("rms-pre", {"norm": "group"}, "norm is group, a groundup_gpt2 model has layer or rms or batch or none"),
    ("rms-pre", {"norm": None}, "norm is None"),
    ("rms-pre", {"norm": ["rms"]}, "norm is "),
    ("rms-pre", {"norm_position": "both"}, "norm_position is both, a groundup_gpt2 model has pre or post"),
    ("rms-pre", {"model_type": "gpt2"}, "norm is rms, a gpt2 model has layer: another model"),
    ("layer-post", {"model_type": "gpt2"}, "norm_position is post, a gpt2 model has pre: another model"),
    ("layer-pre", {"model_type": "groundup_gpt2"}, "norm is None, a groundup_gpt2 model has"),
    ("layer-pre", {"model_type": "groundup_gpt3"}, "a groundup_gpt3 model; groundup imports GPT-2"),
    ("layer-pre", {"model_type": None}, "model_type is None, GPT-2 has 'gpt2'"),
]


@pytest.mark.parametrize(("variant", "change", "said"), WRONG)
def test_a_config_that_contradicts_itself_is_refused(tmp_path, variant, change, said):
    save_model(model_of(variant), tmp_path, end_of_text_id=256)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(CheckpointError) as refusal:
        read_config(path)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("variant", "other"), [("rms-pre", "layer"), ("batch-pre", "layer"), ("layer-post", "rms"), ("none-pre", "rms")]
)
def test_weights_of_another_norm_do_not_fit(tmp_path, variant, other):
    save_model(model_of(variant), tmp_path, end_of_text_id=256)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"norm": other}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="tensors do not fit the model: h.0.ln_1"):
        load_model(tmp_path)


def test_a_batch_norms_file_holds_its_statistics(tmp_path):
    save_model(model_of("batch-pre"), tmp_path, end_of_text_id=256)
    stored = load_file(tmp_path / "model.safetensors")
    assert int(stored["transformer.h.1.ln_2.num_batches_tracked"]) == 2**24 + 1
    assert torch.equal(stored["transformer.ln_f.running_var"], model_of("batch-pre").ln_f.running_var)


# ---- a whole run ----


def trained(folder: Path, name: str, **options: object) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundup.recipes.train.draw_curves", lambda *arguments, **options: None)
        groundup.train(folder / "text.txt", folder / name, **TINY | {"sample_tokens": 0, "save_steps": 3} | options)
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["batch-pre", "batch-post", "rms-post", "none-pre"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, variant):
    """The running statistics go on too; then what is saved is measured and generates."""
    norm, position = variant.split("-")
    options = {"norm": norm, "norm_position": position, "init": "he_normal", "max_steps": 6}
    (tmp_path / "text.txt").write_text(make_text(300), encoding="utf-8")
    whole = trained(tmp_path, "whole", **options)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    trained(tmp_path, "resumed", **options)
    states = [load_model(run / "checkpoint-6").state_dict() for run in (whole, resumed)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    counts = [int(tensor) for name, tensor in states[0].items() if name.endswith("num_batches_tracked")]
    assert all(count >= 6 for count in counts)
    assert bool(counts) == (norm == "batch")
    assert groundup.evaluate(whole)["eval_loss"] > 0
    assert len(groundup.generate(whole, prompt="the", max_new_tokens=5)["completions"]) == 1
