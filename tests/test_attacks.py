"""Accidents that happened once: what a run must not overwrite, mistake for its own, or hide."""

import json
import os
import shutil

import pytest

import groundup
from groundup.checkpoint.commit import checkpoints
from groundup.errors import ConfigError, DivergedError
from tests.conftest import TINY, flags, make_text
from tests.conftest import groundup as command

QUICK = TINY | {"max_steps": 4, "eval_steps": 0, "sample_tokens": 0}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.toml", "loss.png"])
def test_somebody_elses_files_are_not_replaced(text_file, tmp_path, name):
    run = tmp_path / "mine"
    run.mkdir()
    (run / name).write_text('{"text": "precious"}\n')
    with pytest.raises(ConfigError, match=name):
        groundup.train(text_file, run, **QUICK)
    assert (run / name).read_text() == '{"text": "precious"}\n'


def test_which_side_a_text_is_on_is_part_of_the_data(tmp_path):
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (tmp_path / name).write_text(make_text(seed=seed), encoding="utf-8")
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    groundup.prepare(sources, tmp_path / "data", tokenizer="byte")
    with pytest.raises(ConfigError, match="not what it was made from"):
        groundup.prepare(sources[0], tmp_path / "data", tokenizer="byte", validation_source=str(sources[1]))


def test_evaluating_without_the_runs_own_dataset_is_refused(text_file, tmp_path):
    """The training text must not pass for validation text."""
    groundup.train(text_file, tmp_path / "run", **QUICK)
    shutil.rmtree(tmp_path / "run" / "dataset")
    with pytest.raises(ConfigError, match="--data"):
        groundup.evaluate(tmp_path / "run", device="cpu")
    assert groundup.evaluate(tmp_path / "run", device="cpu", data=str(text_file))["tokens"] > 0


def test_a_dataset_that_changed_under_a_run_is_noticed(text_file, tmp_path):
    groundup.prepare(text_file, tmp_path / "data", tokenizer="byte")
    groundup.train(tmp_path / "data", tmp_path / "run", **{k: v for k, v in QUICK.items() if k != "tokenizer"})
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "other.txt").write_text(make_text(seed=9), encoding="utf-8")
    groundup.prepare(tmp_path / "other.txt", tmp_path / "data", tokenizer="byte")
    with pytest.raises(ConfigError, match="was trained on"):
        groundup.evaluate(tmp_path / "run", device="cpu")


def test_a_checkpoint_called_like_a_tokenizer_keeps_its_own(text_file, tmp_path, monkeypatch):
    bpe = QUICK | {"tokenizer": "bpe", "vocab_size": 300}
    groundup.train(text_file, tmp_path / "run", **bpe)
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "byte")
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    measured = [groundup.evaluate(name, device="cpu", data=str(text_file)) for name in ("byte", "other")]
    assert measured[0]["eval_loss"] == measured[1]["eval_loss"]


def test_a_run_called_bpe_resumes(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bpe = QUICK | {"tokenizer": "bpe", "vocab_size": 300}
    groundup.train(text_file, "bpe", **bpe)
    assert groundup.train(text_file, "bpe", **bpe | {"max_steps": 6})["steps"] == 6


def test_a_run_inside_its_source_folder_resumes(tmp_path):
    """What a run writes is not text to train on."""
    (tmp_path / "text.txt").write_text(make_text(), encoding="utf-8")
    (tmp_path / "more.txt").write_text(make_text(seed=1), encoding="utf-8")
    groundup.train(tmp_path, tmp_path / "run", **QUICK)
    assert groundup.train(tmp_path, tmp_path / "run", **QUICK | {"max_steps": 6})["steps"] == 6
    assert groundup.prepare(tmp_path, tmp_path / "data", tokenizer="byte").manifest["documents"] == 2


def test_a_diverged_model_says_so(text_file, tmp_path):
    with pytest.raises(DivergedError):
        groundup.train(text_file, tmp_path / "run", **TINY | {"learning_rate": 1e20, "max_steps": 40, "warmup_steps": 0})


def test_errors_of_the_callers_own_loop_stay_theirs(text_file, tmp_path):
    with pytest.raises(FileExistsError), groundup.open_training(text_file, tmp_path / "run", **QUICK):
        os.mkdir(tmp_path)
    with groundup.open_training(text_file, tmp_path / "run", **QUICK) as again:
        assert sum(1 for _ in again) == 4


def test_a_failed_set_up_names_its_error_and_keeps_the_users_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    done = command("train", "nope.txt", "--output-dir", ".", *flags(QUICK), cwd=tmp_path / "mine")
    assert (done.code, (tmp_path / "mine").is_dir()) == (3, True)
    assert "nope.txt: not found" in done.err


def test_json_is_ascii_and_complete_whatever_the_terminal_speaks(text_file, tmp_path):
    groundup.train(text_file, tmp_path / "run", **QUICK)
    done = command("generate", tmp_path / "run", "--prompt", "日本", "--max-new-tokens", "2", "--json",
                   env={"PYTHONIOENCODING": "latin-1"})  # fmt: skip
    assert json.loads(done.out)["completions"][0]["prompt"] == "日本"


def test_a_quote_that_never_closes_does_not_swallow_a_table(tmp_path):
    (tmp_path / "t.csv").write_text('id,text\n1,"oops\n' + "".join(f"{i},row {i}\n" for i in range(50)))
    done = command("prepare", "t.csv", "--tokenizer", "byte", "--output-dir", "data", cwd=tmp_path)
    assert (done.code, len(done.error_lines)) == (3, 1)


@pytest.mark.timeout(30)
def test_learning_merges_from_one_endless_word_ends(tmp_path):
    (tmp_path / "dna.txt").write_text("ACGTTGCA" * 50_000)
    assert groundup.prepare(tmp_path / "dna.txt", tmp_path / "data", vocab_size=300).tokenizer.vocab_size <= 300


def test_bad_steps_do_not_push_out_good_checkpoints(text_file, tmp_path):
    """At this rate the weights are soon useless, and every step is skipped from then on."""
    options = QUICK | {"max_steps": 60, "learning_rate": 1e3, "warmup_steps": 30, "save_steps": 2}
    with pytest.raises(DivergedError, match=r"up to step (\d+) were kept"):
        groundup.train(text_file, tmp_path / "run", **options)
    kept = [json.loads((path / "trainer_state.json").read_text())["state"] for path in checkpoints(tmp_path / "run")]
    assert any(state["skipped_in_a_row"] == 0 for state in kept)


def test_the_source_is_not_the_output(tmp_path):
    (tmp_path / "text.txt").write_text(make_text(), encoding="utf-8")
    with pytest.raises(ConfigError, match="is the source itself"):
        groundup.train(tmp_path, tmp_path, **QUICK)


def test_every_command_reads_a_runs_configuration(text_file, tmp_path):
    """It holds the options of training; evaluate takes those that it has too, and still names what nobody has."""
    groundup.train(text_file, tmp_path / "run", **QUICK)
    config = tmp_path / "run" / "config.toml"
    assert command("evaluate", tmp_path / "run", "--config", config).code == 0
    (tmp_path / "typo.toml").write_text("bf61 = false\n")
    done = command("evaluate", tmp_path / "run", "--config", tmp_path / "typo.toml")
    assert (done.code, "bf16" in done.err) == (2, True)


def test_a_run_that_has_nothing_to_do_leaves_its_configuration(text_file, tmp_path):
    groundup.train(text_file, tmp_path / "run", **QUICK)
    before = (tmp_path / "run" / "config.toml").read_bytes()
    groundup.train(text_file, tmp_path / "run", **QUICK | {"max_steps": 2})
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_a_short_run_warms_up(text_file, tmp_path):
    with groundup.open_training(text_file, tmp_path / "run", **QUICK) as training:
        assert training.plan.warmup_steps == 1
