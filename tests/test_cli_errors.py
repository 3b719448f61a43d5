"""Bad input to the real command: one line that names it, the exit code, and nothing left behind."""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY, Finished, flags, groundup, make_text

TINY_FLAGS = flags(TINY)


def refused(result, code, *words):
    """One line for a person, the exit code, no traceback, and the names that matter."""
    assert result.code == code, result.err
    assert result.out == ""
    # Progress may come before; what is wrong is one line, the last.
    assert len(result.error_lines) == 1, result.err
    assert result.err.splitlines()[-1] == result.error_lines[0]
    for word in words:
        assert str(word) in result.error_lines[0]
    assert "Traceback" not in result.err
    assert "internal error" not in result.err


def refused_at_once(result, code, *words):
    refused(result, code, *words)
    assert len(result.err.splitlines()) == 1


# Importing torch takes two seconds, so the fast tier tries preparing only.
@pytest.fixture(params=["prepare", pytest.param("train", marks=pytest.mark.slow)])
def verb(request):
    """A command that takes sources, with small options, and its name."""
    return [request.param, *(TINY_FLAGS if request.param == "train" else ["--tokenizer", "byte"])]


def left(folder, *expected):
    """What is in a folder now, hidden files too."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


# --- sources ---


def test_a_missing_source(tmp_path, verb):
    refused_at_once(groundup(*verb, tmp_path / "absent.txt", "--output-dir", tmp_path / "out"), 3, tmp_path / "absent.txt")
    left(tmp_path)


def test_no_source_at_all(tmp_path, verb):
    refused_at_once(groundup(*verb, "--output-dir", tmp_path / "out"), 2, "sources: none given")
    left(tmp_path)


def test_an_empty_file(tmp_path, verb):
    (tmp_path / "empty.txt").write_text("")
    refused_at_once(groundup(*verb, tmp_path / "empty.txt", "--output-dir", tmp_path / "out"), 3, "empty.txt", "no text")
    left(tmp_path, "empty.txt")


def test_a_folder_of_binaries(tmp_path, verb):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"\x89PNG\0\0\0")
    refused_at_once(groundup(*verb, tmp_path / "images", "--output-dir", tmp_path / "out"), 3, "images", "3 binary")
    left(tmp_path, "images")


def test_a_truncated_gz(tmp_path, verb):
    data = gzip.compress(make_text().encode())
    (tmp_path / "a.txt.gz").write_bytes(data[: len(data) // 2])
    refused_at_once(groundup(*verb, tmp_path / "a.txt.gz", "--output-dir", tmp_path / "out"), 3, "a.txt.gz", "truncated")
    left(tmp_path, "a.txt.gz")


def test_text_shorter_than_a_context(tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("0123456789")
    result = groundup("train", source, "--output-dir", tmp_path / "out", *TINY_FLAGS)
    refused(result, 3, "train has 10 tokens", "n_positions 16 needs 17")
    assert not list(tmp_path.rglob("checkpoint*"))
    assert not list(tmp_path.rglob("*.partial"))


def test_invalid_utf_8_when_strict(tmp_path, verb):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    result = groundup(*verb, tmp_path / "a.txt", "--output-dir", tmp_path / "out", "--encoding-errors", "strict")
    refused_at_once(result, 3, "a.txt", "byte 3")
    left(tmp_path, "a.txt")


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path):
    (tmp_path / "a\nb.gz").write_bytes(b"not gzip")
    refused_at_once(groundup("prepare", tmp_path / "a\nb.gz", "--output-dir", tmp_path / "out"), 3, "b.gz", "damaged")


def test_a_name_that_is_no_utf_8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(name, "w") as file:
        file.write(make_text())
    result = groundup("prepare", os.fsdecode(name), "--output-dir", tmp_path / "out", "--tokenizer", "byte", "--json")
    assert result.code == 0, result.err
    assert result.json["documents"] == 1


def test_a_name_that_is_too_long_is_not_called_an_output(tmp_path):
    result = groundup("prepare", "x" * 300, "--output-dir", tmp_path / "out")
    refused_at_once(result, 3, "source", "x" * 300)


@pytest.mark.slow
def test_a_dataset_with_a_flipped_bit(tmp_path, text_file):
    data = tmp_path / "data"
    assert groundup("prepare", text_file, "--tokenizer", "byte", "--output-dir", data).code == 0
    shard = data / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    options = {name: value for name, value in TINY.items() if name != "tokenizer"}
    refused(groundup("train", data, "--output-dir", tmp_path / "run", *flags(options)), 3, "train-00000.npy", "damaged")


# --- options ---


@pytest.mark.parametrize("flag", ["--n-layr", "--n_layr", "--n-layr=2"])
def test_a_misspelt_option_names_the_nearest(tmp_path, text_file, flag):
    refused_at_once(groundup("train", text_file, "--output-dir", tmp_path / "out", flag, "2"), 2, "--n-lay", "--n-layer")
    left(tmp_path, "text.txt")


def test_a_misspelt_command_names_the_nearest():
    refused_at_once(groundup("trian", "x"), 2, "trian", "train")


def test_no_command_shows_the_help():
    result = groundup()
    assert result.code == 2
    assert "Usage: groundup" in result.out + result.err
    # Laid out in lines, as --help is, not folded into one.
    assert len((result.out + result.err).splitlines()) > 5


def test_a_missing_output_dir(text_file, verb):
    refused_at_once(groundup(*verb, text_file), 2, "--output-dir")


def test_width_not_divisible_by_heads(tmp_path, text_file):
    result = groundup("train", text_file, "--output-dir", tmp_path / "out", "--n-embd", "130", "--n_head", "4")
    refused_at_once(result, 2, "n_embd: 130", "--n-embd", "--n-head", "4")
    left(tmp_path, "text.txt")


def test_several_problems_are_a_line_each(tmp_path, text_file):
    result = groundup("train", text_file, "--output-dir", tmp_path / "out", "--n-layer", "x", "--device", "tpu", "--seed=-1")
    assert (result.code, result.out) == (2, "")
    assert len(result.error_lines) == len(result.err.splitlines()) == 3
    for line, name in zip(result.error_lines, ("n_layer", "seed", "device"), strict=True):
        assert name in line


def test_an_unknown_preset(tmp_path, text_file):
    result = groundup("train", text_file, "--output-dir", tmp_path / "out", "--model", "gpt2-nanno")
    refused_at_once(result, 2, "gpt2-nanno", "--model", "did you mean gpt2-nano?")
    left(tmp_path, "text.txt")


def test_an_unknown_tokenizer(tmp_path, verb, text_file):
    verb = [word for word in verb if word not in ("--tokenizer", "byte")]
    result = groundup(*verb, text_file, "--output-dir", tmp_path / "out", "--tokenizer", "bite")
    refused_at_once(result, 3, "bite", "byte")
    left(tmp_path, "text.txt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["run.toml", "not found"]),
        ("n_layer = = 2", ["run.toml", "cannot be read as TOML"]),
        ("n_layr = 2", ["n_layr", "run.toml", "n_layer"]),
        ("n_layer = 1.5", ["n_layer", "1.5", "run.toml"]),
        ("sources = 5", ["sources", "5", "run.toml"]),
    ],
)
def test_a_bad_config_file(tmp_path, content, words):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    refused_at_once(groundup("train", "--config", file, "--output-dir", tmp_path / "out"), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_list", [True, False])
def test_sources_in_a_config_file(tmp_path, text_file, as_list):
    """One source may be written without brackets, as for every option that takes several."""
    source = json.dumps(str(text_file))
    (tmp_path / "run.toml").write_text(f'sources = {f"[{source}]" if as_list else source}\ntokenizer = "byte"\n')
    result = groundup("prepare", "--config", tmp_path / "run.toml", "--output-dir", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert result.json["documents"] == 1


# --- outputs ---


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_an_output_that_cannot_be_made(tmp_path, verb, text_file):
    """Root may write anywhere, but not there."""
    refused(groundup(*verb, text_file, "--output-dir", "/proc/no-such-folder"), 2, "/proc/", "--output-dir")


def test_an_output_below_a_file(tmp_path, verb, text_file):
    refused_at_once(groundup(*verb, text_file, "--output-dir", text_file / "out"), 2, text_file, "--output-dir")
    left(tmp_path, "text.txt")


def test_an_output_that_is_a_file(tmp_path, verb, text_file):
    before = text_file.read_bytes()
    refused_at_once(groundup(*verb, text_file, "--output-dir", text_file), 2, text_file, "--output-dir")
    assert text_file.read_bytes() == before
    left(tmp_path, "text.txt")


def test_an_output_with_a_name_that_is_too_long(tmp_path, verb, text_file):
    refused_at_once(groundup(*verb, text_file, "--output-dir", tmp_path / ("x" * 300)), 2, "x" * 300)
    left(tmp_path, "text.txt")


def in_small_filesystem(tmp_path, kibibytes, command):
    """Run in a mount namespace of its own, with a tiny file system at ``tmp_path/disk``; its listing comes back too."""
    disk = tmp_path / "disk"
    disk.mkdir()
    line = " ".join(shlex.quote(str(word)) for word in [sys.executable, "-m", "groundup", *command])
    listing = tmp_path / "listing"
    script = (
        f"mount -t tmpfs -o size={kibibytes}k none {disk} || exit 99; {line}; code=$?; ls -A {disk} > {listing}; exit $code"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mount namespace here")
    return Finished(done.returncode, done.stdout, done.stderr), listing.read_text().split()


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
@pytest.mark.parametrize("verb", ["prepare", pytest.param("train", marks=pytest.mark.slow)])
def test_a_full_disk(tmp_path, verb):
    source = tmp_path / "text.txt"
    source.write_text(make_text(60_000))
    options = TINY_FLAGS if verb == "train" else ["--tokenizer", "byte"]
    command = [verb, source, "--output-dir", tmp_path / "disk" / "out", "--shard-tokens", 20_000, *options]
    result, listing = in_small_filesystem(tmp_path, 256, command)
    refused(result, 6, "no space left", tmp_path / "disk", "MiB free")
    if verb == "prepare":
        assert listing == []


# --- checkpoints ---


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_missing_checkpoint(tmp_path, verb):
    refused_at_once(groundup(verb, tmp_path / "absent"), 4, tmp_path / "absent", "not found")
    (tmp_path / "empty").mkdir()
    refused_at_once(groundup(verb, tmp_path / "empty"), 4, tmp_path / "empty", "no checkpoint")
    left(tmp_path, "empty")


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_no_checkpoint_named(verb):
    refused_at_once(groundup(verb), 2, "RUN_OR_CHECKPOINT")


# --- the ways of the command line ---


def test_json_is_one_object_and_nothing_else(tmp_path, text_file):
    result = groundup("prepare", text_file, "--tokenizer", "byte", "--output-dir", tmp_path / "out", "--json")
    assert result.code == 0
    assert result.out.count("\n") == 1
    for key in ("documents", "train_tokens", "validation_tokens", "bytes", "vocab_size"):
        assert isinstance(result.json[key], int)
    assert result.json["vocab_size"] == 257
    refused_at_once(groundup("prepare", tmp_path / "absent", "--output-dir", tmp_path / "o", "--json"), 3, "absent")


def test_without_json_the_next_step_is_named(tmp_path, text_file):
    result = groundup("prepare", text_file, "--tokenizer", "byte", "--output-dir", tmp_path / "out")
    assert f"groundup train {tmp_path / 'out'}" in result.out
    assert "read 1 document" in result.err
    assert "read 1" not in result.out


def test_debug_shows_a_traceback_and_the_line_all_the_same(tmp_path):
    command = ["prepare", tmp_path / "absent.txt", "--output-dir", tmp_path / "out"]
    result = groundup(*command, "--debug")
    assert result.code == 3
    assert "Traceback (most recent call last)" in result.err
    assert "absent.txt" in result.error_lines[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["train", "--help"], ["generate", "-h"]])
def test_help_and_version_succeed_on_standard_output(arguments):
    result = groundup(*arguments)
    assert (result.code, result.err) == (0, "")
    assert "groundup" in result.out


def test_help_imports_no_heavy_library():
    """Under half a second, because a person waits for it."""
    probe = (
        "import sys; from groundup.cli.main import run; run(['train', '--help']); print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "click" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "tokenizers",
        "tiktoken",
        "transformers",
        "matplotlib",
        "pyarrow",
        "safetensors",
        "rich",
    }


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m groundup train --help | head -c 10; echo ${{PIPESTATUS[0]}}",
        shell=True, executable=shutil.which("bash"), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
