"""Runs on several sources with weights: what is measured of each, and what a changed mixture is."""

import json
from pathlib import Path

import numpy as np
import pytest

import groundup
from groundup.cli.main import run as command
from groundup.errors import ConfigError
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, make_text
from tests.runs import assert_same_end, contents

pytestmark = pytest.mark.usefixtures("quick")

RUN = TINY | {"sample_tokens": 0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
FIGURES = ("loss", "perplexity", "bits_per_byte", "token_accuracy", "tokens")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "prose.txt").write_text(make_text(800), encoding="utf-8")
    (folder / "shouts.txt").write_text(make_text(400, seed=1).upper(), encoding="utf-8")
    return folder


def sources(texts: Path, prose: float = 3, shouts: float = 1) -> list[str]:
    return [f"prose={texts / 'prose.txt'}:{prose}", f"shouts={texts / 'shouts.txt'}:{shouts}"]


@pytest.fixture(scope="module")
def mixed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("mixed") / "run"
    groundup.train([], run, **RUN | {"source": sources(texts)})
    return run


def named_flags(texts: Path, prose: float = 3, shouts: float = 1) -> list[str]:
    found = ["--tokenizer", "byte", "--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--n-positions", "16"]
    found += ["--total-batch-tokens", "128", "--max-steps", "20", "--device", "cpu", "--no-bf16"]
    return [*found, *(f"--source={source}" for source in sources(texts, prose, shouts))]


def test_each_source_has_figures_of_its_own(mixed, texts, tmp_path):
    """Those that the source measures alone; together they are the whole."""
    row = read_rows(mixed / "metrics.jsonl")[-1]
    assert row["step"] == 12
    for name in ("prose", "shouts"):
        alone = groundup.evaluate(mixed, device="cpu", data=str(mixed / "dataset"))["sources"][name]
        for figure in FIGURES:
            key = "eval_loss" if figure == "loss" else figure
            assert row[f"eval_{name}_{figure}"] == pytest.approx(alone[key], rel=1e-6)
    assert row["eval_prose_loss"] != row["eval_shouts_loss"]
    total = row["eval_prose_tokens"] + row["eval_shouts_tokens"]
    mean = sum(row[f"eval_{name}_loss"] * row[f"eval_{name}_tokens"] for name in ("prose", "shouts")) / total
    assert (row["eval_tokens"], row["eval_loss"]) == (total, pytest.approx(mean))


def test_the_weights_are_what_is_read(mixed, texts):
    """Capital letters, which only one of them holds, tell whose a window is."""
    with groundup.open_training([], mixed, **RUN | {"source": sources(texts)}) as training:
        tokens = training.course.samples.read(np.arange(4000))
        loud = sum(np.isin(window, range(ord("A"), ord("Z") + 1)).mean() > 0.3 for window in tokens)
        assert loud / 4000 == pytest.approx(0.25, abs=0.02)


def test_evaluate_prints_each_source(mixed, capsys):
    assert command(["evaluate", str(mixed), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["sources"]) == ["prose", "shouts"]
    assert all(set(part) == {"eval_loss", "perplexity", "bits_per_byte", "token_accuracy", "tokens"}
               for part in found["sources"].values())  # fmt: skip
    assert sum(part["tokens"] for part in found["sources"].values()) == found["tokens"]
    assert command(["evaluate", str(mixed), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name, part in found["sources"].items():
        line = next(line for line in said.splitlines() if name in line)
        assert f"{part['eval_loss']:.4f}" in line


def test_training_says_each_source(texts, tmp_path, capsys):
    groundup.train([], tmp_path / "run", **RUN | {"source": sources(texts), "max_steps": 1})
    said = [line for line in capsys.readouterr().err.splitlines() if "validation: loss" in line]
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert said[-1].endswith(f"; prose {row['eval_prose_loss']:.4f}; shouts {row['eval_shouts_loss']:.4f}")


@pytest.mark.parametrize(
    "change",
    [{"prose": 1}, {"shouts": 1.01}, {"without": "shouts"}, {"name": "other"}, {"named": False}],
    ids=["weight", "a little", "one less", "another name", "not mixed"],
)
def test_a_changed_mixture_is_refused_in_a_line_that_names_the_sources(mixed, texts, change, capsys):
    before = contents(mixed)
    named = sources(texts, **{key: value for key, value in change.items() if key in ("prose", "shouts")})
    if "without" in change:
        named = named[:1]
    if "name" in change:
        named[1] = named[1].replace("shouts=", "other=")
    given = ([str(texts / "prose.txt")], {}) if "named" in change else ([], {"source": named})
    with pytest.raises(ConfigError) as error:
        groundup.train(given[0], mixed, **RUN | given[1] | {"max_steps": 20})
    said = str(error.value)
    assert "\n" not in said
    assert "shouts" in said
    assert contents(mixed) == before
    arguments = [*given[0], *(f"--source={source}" for source in given[1].get("source", []))]
    shape = [flag for flag in named_flags(texts) if not flag.startswith("--source")]
    capsys.readouterr()
    assert command(["train", *arguments, "--output-dir", str(mixed), *shape]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]) == 1
    assert contents(mixed) == before


def test_the_same_shares_in_another_order_and_unit_are_the_same_run(texts, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    groundup.train([], straight, **RUN | {"source": sources(texts)})
    groundup.train([], run, **RUN | {"source": sources(texts), "max_steps": 6})
    groundup.train([], run, **RUN | {"source": sources(texts, 0.75, 0.25)[::-1]})
    assert_same_end(run, straight)


def test_a_source_must_not_be_called_like_a_figure(texts, tmp_path):
    """ema would take the place of the averaged weights' figures in metrics.jsonl."""
    named = [source.replace("shouts=", "ema=") for source in sources(texts)]
    with pytest.raises(ConfigError, match="source: .*ema"):
        groundup.train([], tmp_path / "run", **RUN | {"source": named, "ema_decay": 0.9, "max_steps": 1})
    groundup.train([], tmp_path / "plain", **RUN | {"source": named, "max_steps": 1})


def test_a_metric_of_a_source_that_is_not_there_is_refused(text_file, tmp_path):
    with pytest.raises(
        ConfigError, match="metric_for_best_model: wiki_loss .* is of no source of the data; this run measures loss"
    ):
        groundup.train(text_file, tmp_path / "run", **TINY | {"metric_for_best_model": "wiki_loss"})
