"""groundup export: other programs open what it writes; it is compared before it has its name; what cannot be is refused."""

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

import groundup
from groundup.interop import gguf_files
from groundup.interop.gguf_files import read_gguf
from groundup.interop.huggingface import save_model
from groundup.interop.imported import build_model
from groundup.interop.openai import read_openai
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.recipes import exporting
from groundup.runtime import files
from groundup.tokenizer.tokenizer import Tokenizer, byte_tokenizer
from tests.test_cli_errors import left, refused
from tests.test_importing import BPE, CONFIG, TEXTS, Call, called, hugging_face_folder, train_small, weights_of
from tests.test_interop import assert_same_bits, logits_of, new_model

FORMS = ("hf", "gguf", "openai-state-dict")
WIDE = GPT2Config(vocab_size=257, n_positions=12, n_embd=32, n_layer=2, n_head=2)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *arguments: called(capsys, *arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each kind of tokenizer; nothing changes them."""
    return {
        "byte": train_small(tmp_path_factory.mktemp("byte"), save_steps=1, save_total_limit=0),
        "bpe": train_small(tmp_path_factory.mktemp("bpe"), **BPE),
    }


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model whose numbers are all different."""
    return hugging_face_folder(tmp_path / "wide", new_model(WIDE))


def opened_by_transformers(folder: Path) -> Any:
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def assert_same_logits_in_transformers(folder: Path, model: GPT2) -> None:
    ids = torch.randint(model.config.vocab_size, (2, model.config.n_positions), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(opened_by_transformers(folder)(ids).logits, logits_of(model, ids), rtol=1e-5, atol=1e-5)


# ---- what others open ----


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_transformers_opens_the_folder(call, runs, tmp_path, kind):
    import transformers

    done = call("export", runs[kind], tmp_path / "out", "--json")
    assert done.code == 0, done.err
    ours = groundup.load(runs[kind])
    assert_same_logits_in_transformers(tmp_path / "out", ours.model)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS[:3]:
        assert theirs.encode(text, add_special_tokens=False) == ours.tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == ours.tokenizer.end_of_text_id
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    left(tmp_path / "out", *names)
    assert done.json["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in names)


def test_the_card_says_what_the_run_knows(call, runs, tmp_path):
    assert call("export", runs["byte"], tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# run" in card
    assert "started from random weights" in card
    assert "text.txt" in card


def test_the_card_of_somebody_elses_model_claims_nothing(call, wide, tmp_path):
    """Neither of a folder nor of a file, whatever lies beside it."""
    (tmp_path / "config.toml").write_text('# written by groundup\nsources = ["secret.txt"]\n')
    assert call("export", wide, tmp_path / "model.gguf", "--format", "gguf").code == 0
    for number, source in enumerate((wide, tmp_path / "model.gguf")):
        assert call("export", source, tmp_path / str(number)).code == 0
        card = (tmp_path / str(number) / "README.md").read_text()
        assert f"# {source.name}" in card
        assert "random weights" not in card
        assert "secret" not in card


STORED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# How far a logit of this model may move, which are as large as 10: wide of the rounding, far below another model's.
NEAR = {"f32": 1e-4, "f16": 0.02, "bf16": 0.2, "q8_0": 0.2}


@pytest.mark.parametrize("dtype", STORED)
def test_each_type_of_a_folder(call, wide, tmp_path, dtype):
    done = call("export", wide, tmp_path / "out", "--dtype", dtype, "--json")
    assert done.code == 0, done.err
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        f"torch.{STORED[dtype]}"
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == STORED[dtype]
    report = done.json
    assert report.keys() == {"format", "dtype", "parameters", "bytes", "largest_logit_difference", "path"}
    assert (report["format"], report["dtype"], report["path"]) == ("hf", dtype, str(tmp_path / "out"))
    assert report["parameters"] == sum(tensor.numel() for tensor in weights_of(wide).values())
    assert report["largest_logit_difference"] <= NEAR[dtype]
    assert (report["largest_logit_difference"] > 1e-4) == (dtype != "f32")
    shown = f"{report['largest_logit_difference']:.2g}"
    assert f"read back by groundup and transformers: the largest difference of a logit is {shown}" in done.err


@pytest.mark.parametrize("dtype", [*STORED, "q8_0"])
def test_each_type_of_a_file(call, wide, tmp_path, dtype):
    done = call("export", wide, tmp_path / "my model.gguf", "--format", "gguf", "--dtype", dtype, "--json")
    assert done.code == 0, done.err
    reader = gguf.GGUFReader(tmp_path / "my model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == dtype.upper()
    assert kinds["output_norm.weight"] == kinds["position_embd.weight"] == "F32"
    assert reader.fields["general.name"].contents() == "my model"
    assert done.json["bytes"] == (tmp_path / "my model.gguf").stat().st_size
    assert done.json["largest_logit_difference"] <= NEAR[dtype]
    assert "read back by groundup: the largest" in done.err


def test_smaller_types_make_smaller_files(call, wide, tmp_path):
    sizes = [
        call("export", wide, tmp_path / dtype, "--format", "gguf", "--dtype", dtype, "--json").json["bytes"]
        for dtype in ("f32", "f16", "q8_0")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_the_difference_is_that_of_what_was_written(call, wide, tmp_path):
    """By hand, from the file."""
    done = call("export", wide, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "q8_0", "--json")
    first, second = groundup.load(wide).model, read_gguf(tmp_path / "m.gguf").model
    ids = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = float((logits_of(first, ids) - logits_of(second, ids)).abs().max())
    assert expected > 0
    assert done.json["largest_logit_difference"] == pytest.approx(expected, rel=1e-3)


def test_the_report_for_people(call, wide, tmp_path):
    done = call("export", wide, tmp_path / "out", "--format", "openai-state-dict")
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / 'out'}: openai-state-dict, f32, ")
    assert done.out.endswith(" MB\n")


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_is_itself(call, runs, tmp_path):
    run = runs["byte"]
    for source, step in ((run, 3), (run / "checkpoint-1", 1)):
        assert call("export", source, tmp_path / str(step), "--format", "openai-state-dict").code == 0
        expected = weights_of(run / f"checkpoint-{step}")
        assert_same_bits(dict(read_openai(tmp_path / str(step)).model.state_dict()), expected)
    assert not torch.equal(weights_of(run / "checkpoint-1")["wte.weight"], weights_of(run)["wte.weight"])


def test_what_was_imported_can_be_exported(call, wide, tmp_path):
    assert call("import", wide, tmp_path / "in").code == 0
    for form in FORMS:
        assert call("export", tmp_path / "in", tmp_path / form, "--format", form).code == 0
        assert_same_bits(weights_of(tmp_path / form), weights_of(wide))


def test_one_form_of_theirs_becomes_another(call, wide, tmp_path):
    assert call("export", wide, tmp_path / "m.gguf", "--format", "gguf").code == 0
    assert call("export", tmp_path / "m.gguf", tmp_path / "openai", "--format", "openai-state-dict").code == 0
    assert call("export", tmp_path / "openai", tmp_path / "hf").code == 0
    assert_same_logits_in_transformers(tmp_path / "hf", new_model(WIDE))


# ---- models that not every format can hold ----


def test_a_head_of_its_own(call, tmp_path):
    model = new_model(replace(WIDE, tie_word_embeddings=False))
    source = hugging_face_folder(tmp_path / "source", model)
    refused(
        call("export", source, tmp_path / "openai", "--format", "openai-state-dict"), 4, "tie_word_embeddings", "--format hf"
    )
    left(tmp_path, "source")
    assert call("export", source, tmp_path / "m.gguf", "--format", "gguf").code == 0
    assert_same_bits(weights_of(tmp_path / "m.gguf"), dict(model.state_dict()))
    assert call("export", source, tmp_path / "hf").code == 0
    assert_same_logits_in_transformers(tmp_path / "hf", model)


def test_the_exact_gelu(call, tmp_path):
    model = new_model(replace(WIDE, activation_function="gelu"))
    source = hugging_face_folder(tmp_path / "source", model)
    refused(
        call("export", source, tmp_path / "openai", "--format", "openai-state-dict"), 4, "activation_function", "--format hf"
    )
    left(tmp_path, "source")
    done = call("export", source, tmp_path / "hf", "--json")
    assert "GELU" not in done.err
    assert_same_logits_in_transformers(tmp_path / "hf", model)
    done = call("export", source, tmp_path / "m.gguf", "--format", "gguf", "--json")
    assert done.code == 0, done.err
    assert "llama.cpp computes GELU in its tanh form" in done.err
    assert 0 < done.json["largest_logit_difference"] < 0.1


def test_another_tokenizer_than_gpt2s_kind_goes_to_hugging_face_only(call, tmp_path):
    spec = json.loads(byte_tokenizer().json)
    spec["normalizer"] = {"type": "NFC"}
    source = hugging_face_folder(tmp_path / "source", new_model(CONFIG), Tokenizer(json.dumps(spec)))
    for form, words in (("gguf", "normalizer NFC"), ("openai-state-dict", "prepares text in another way")):
        refused(call("export", source, tmp_path / "out", "--format", form), 4, words)
    left(tmp_path, "source")
    assert call("export", source, tmp_path / "out").code == 0


# ---- what is refused ----


@pytest.mark.parametrize(
    ("form", "dtype", "words"),
    [
        ("hf", "q8_0", "gguf only; hf takes f32, f16, bf16"),
        ("openai-state-dict", "f16", "leave --dtype out"),
        ("openai-state-dict", "q8_0", "leave --dtype out"),
    ],
)
def test_a_type_that_a_format_does_not_have_is_refused_before_anything_is_read(call, tmp_path, form, dtype, words):
    refused(
        call("export", tmp_path / "absent", tmp_path / "out", "--format", form, "--dtype", dtype), 2, f"dtype: {dtype}", words
    )
    left(tmp_path)


@pytest.mark.parametrize(("option", "value", "words"), [("--format", "onnx", "gguf"), ("--dtype", "int4", "q8_0")])
def test_what_does_not_exist_is_refused(call, wide, tmp_path, option, value, words):
    refused(call("export", wide, tmp_path / "out", option, value), 2, value, f"from {option}", words)
    left(tmp_path, "wide")


def test_there_is_nothing_to_export(call, tmp_path):
    refused(call("export", tmp_path / "absent", tmp_path / "out"), 4, tmp_path / "absent", "not found")
    left(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_folder_can_be_the_target(call, wide, tmp_path, form):
    (tmp_path / "out").mkdir()
    assert call("export", wide, tmp_path / "out", "--format", form).code == 0
    assert_same_bits(weights_of(tmp_path / "out"), weights_of(wide))
    left(tmp_path, "wide", "out")


def test_folders_above_the_target_are_made(call, wide, tmp_path):
    assert call("export", wide, tmp_path / "a" / "b" / "m.gguf", "--format", "gguf").code == 0
    left(tmp_path / "a" / "b", "m.gguf")


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_number_that_the_type_cannot_hold_is_refused(call, tmp_path, form):
    """65,504 is the largest in f16. It is the model, not a fault of groundup's."""
    model = new_model(WIDE)
    with torch.no_grad():
        model.wte.weight[3, 3] = 1e5
    source = hugging_face_folder(tmp_path / "source", model)
    done = call("export", source, tmp_path / "out", "--format", form, "--dtype", "f16")
    refused(done, 4, "wte.weight", "1e+05", "f16")
    assert "report this" not in done.err
    left(tmp_path, "source")


# ---- compared before it has its name ----


def shifted(model: GPT2) -> GPT2:
    """The same model, its last bias off by one: what a fault in a writer would give."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["ln_f.bias"] += 1.0
    return build_model(model.config, tensors, "test")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_file_that_does_not_read_back_gets_no_name(call, wide, tmp_path, monkeypatch, form, dtype):
    if form == "openai-state-dict" and dtype != "f32":
        pytest.skip("has f32 only")
    writer = {"hf": "save_model", "gguf": "write_gguf", "openai-state-dict": "write_openai"}[form]
    write = getattr(exporting, writer)
    monkeypatch.setattr(exporting, writer, lambda model, *rest, **named: write(shifted(model), *rest, **named))
    done = call("export", wide, tmp_path / "out", "--format", form, "--dtype", dtype)
    refused(done, 4, tmp_path / "out", "does not read back", "nothing was written")
    left(tmp_path, "wide")


def test_a_file_that_only_transformers_reads_otherwise_gets_no_name(call, wide, tmp_path, monkeypatch):
    """Two readers: what our own reader would pass over, theirs does not."""

    def save(model: GPT2, directory: Path, *rest: Any, **named: Any) -> None:
        save_model(model, directory, *rest, **named)
        file = directory / "config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"reorder_and_upcast_attn": False, "layer_norm_epsilon": 0.5})
        )

    monkeypatch.setattr(exporting, "save_model", save)
    monkeypatch.setattr(exporting, "_read_back", lambda path, form: groundup.load(wide).model)
    refused(call("export", wide, tmp_path / "out"), 4, "does not read back")
    left(tmp_path, "wide")


def test_without_transformers_only_groundup_reads_it_back(call, wide, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    done = call("export", wide, tmp_path / "out")
    assert done.code == 0, done.err
    assert "read back by groundup: the largest" in done.err


# ---- what is left ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "No space left on device"), 6), (OSError(errno.EROFS, "Read-only"), 2), (KeyboardInterrupt(), 130)],
)
def test_an_export_that_fails_at_its_end_leaves_nothing(call, wide, tmp_path, monkeypatch, form, error, code):
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "_give_name", fail)
        done = call("export", wide, tmp_path / "out", "--format", form)
    assert done.code == code, done.err
    assert len(done.error_lines) == 1
    left(tmp_path, "wide")
    assert call("export", wide, tmp_path / "out", "--format", form).code == 0


def test_what_a_killed_export_left_is_swept_up_by_the_next(call, wide, tmp_path):
    for name in (".out.abc.partial", ".out.mine.partial", ".out.busy.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
        if name != ".out.mine.partial":
            (tmp_path / name / files.STAGING_LOCK).touch()
    with files.exclusive(tmp_path / ".out.busy.partial" / files.STAGING_LOCK, "test"):
        assert call("export", wide, tmp_path / "out", "--format", "gguf").code == 0
    left(tmp_path, "wide", "out", ".out.mine.partial", ".out.busy.partial")


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_what_comes_to_the_place_meanwhile_is_not_replaced(call, wide, tmp_path, monkeypatch, form):
    place, give_name = tmp_path / "out", files._give_name

    def late(staged: Path, target: Path) -> None:
        if form == "hf":
            place.mkdir()
            (place / "thesis.txt").write_text("precious")
        else:
            place.write_text("precious")
        give_name(staged, target)

    monkeypatch.setattr(files, "_give_name", late)
    refused(call("export", wide, place, "--format", form), 2, place, "meanwhile")
    assert (place / "thesis.txt" if form == "hf" else place).read_text() == "precious"
    left(tmp_path, "wide", "out")


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "device"])
def test_only_a_file_or_a_folder_takes_a_name(call, wide, tmp_path, kind):
    """A link to nothing is followed, a pipe or a device is never replaced."""
    place = tmp_path / "out"
    if kind == "dangling link":
        place.symlink_to(tmp_path / "real")
        assert call("export", wide, place, "--format", "gguf").code == 0
        assert place.is_symlink()
        assert (tmp_path / "real").is_file()
        return
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/null")
    refused(call("export", wide, place, "--format", "gguf"), 2, "exists already")
    assert not place.is_file()


def test_a_gguf_file_that_cannot_be_finished_is_no_internal_error(call, wide, tmp_path, monkeypatch):
    """numpy reports a full disk in words alone: "2056 requested and 1576 written"."""

    def fail(*_: object) -> None:
        raise OSError("2056 requested and 1576 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    refused(call("export", wide, tmp_path / "out", "--format", "gguf"), 6, tmp_path / "out")
    left(tmp_path, "wide")


@pytest.mark.parametrize("form", FORMS)
def test_files_have_the_users_own_mode(call, wide, tmp_path, form):
    """safetensors writes files that only their owner may read."""
    mask = os.umask(0o027)
    try:
        assert call("export", wide, tmp_path / "out", "--format", form).code == 0
    finally:
        os.umask(mask)
    target = tmp_path / "out"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (target.iterdir() if target.is_dir() else [target])}
    assert modes == {0o640}


def test_the_source_is_only_read(call, runs, tmp_path):
    def state() -> dict[Path, tuple[int, int]]:
        files = [path for path in runs["byte"].rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = state()
    for form in FORMS:
        assert call("export", runs["byte"], tmp_path / form, "--format", form).code == 0
    assert state() == before


def test_without_its_library_a_gguf_file_is_refused(call, wide, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(call("export", wide, tmp_path / "out", "--format", "gguf"), 2, "pip install 'groundup[gguf]'")
    left(tmp_path, "wide")
    assert gguf_files.DTYPES == ("f32", "f16", "bf16", "q8_0")
