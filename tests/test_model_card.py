"""The README.md of a model folder: what it says, what it leaves out, and Markdown that no file name can break."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import groundup
from groundup.checkpoint.commit import checkpoints
from groundup.interop.huggingface import save_model
from groundup.interop.model_card import card_of_checkpoint, model_card
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, make_text

SECTIONS = ["Use", "Results", "Data", "Model", "Training", "Train another like it", "Versions"]


def titles(card: str) -> list[str]:
    return re.findall(r"^## (.*)$", outside_code(card), flags=re.MULTILINE)


def outside_code(card: str) -> str:
    """The card without its fenced blocks."""
    return re.sub(r"^(`{3,}).*?\n.*?\n\1$", "", card, flags=re.MULTILINE | re.DOTALL)


def configuration_in(card: str) -> dict[str, Any]:
    found = re.search(r"^(`{3,})toml\n(.*?)\n\1$", card, flags=re.MULTILINE | re.DOTALL)
    assert found
    return tomllib.loads(found[2])


def rows_of(card: str) -> dict[str, str]:
    """The cells of all tables."""
    return dict(re.findall(r"^\| ((?:\\\||[^|])+?) \| ((?:\\\||[^|])+?) \|$", card, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    (folder / "text.txt").write_text(make_text(800), encoding="utf-8")
    groundup.train(folder / "text.txt", folder / "my_run", **TINY)
    return folder / "my_run"


def test_a_run_gets_a_whole_card(run):
    card = card_of_checkpoint(checkpoints(run)[-1], license="mit")
    assert titles(card) == SECTIONS
    assert card.startswith('---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: "mit"\ntags:\n')
    assert "# my\\_run\n" in card
    assert "started from random weights" in card
    assert str(run.parent / "text.txt") in card
    facts, manifest = rows_of(card), json.loads((run / "dataset" / "dataset.json").read_text(encoding="utf-8"))
    assert facts["steps"] == "12 of 12 planned"
    assert facts["tokens seen"] == f"{12 * 128:,}"
    assert facts["batch"] == "128 tokens a step"
    assert facts["seed"] == "42"
    assert facts["training split"].startswith(f"{manifest['splits']['train']['tokens']:,} tokens (1 document, ")
    assert facts["vocabulary"] == "257 ids"
    assert facts["parameters"] == f"{sum(p.numel() for p in groundup.load(run).model.parameters()):,}"
    assert facts["groundup"] == f"`{groundup.__version__}`"


def test_the_configuration_is_the_runs_own(run):
    """Word for word enough to train again: it is TOML, and equal."""
    card = card_of_checkpoint(checkpoints(run)[-1])
    assert configuration_in(card) == tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    assert "groundup train --config config.toml --output-dir another" in card


def test_results_are_those_of_the_checkpoints_step(run):
    """A checkpoint of step 8 has seen the evaluation of step 6 and the loss of step 8, not those that came later."""
    rows = read_rows(run / "metrics.jsonl")
    of = {(row["step"], "eval_loss" in row): row for row in rows}
    early = [path for path in checkpoints(run) if path.name == "checkpoint-8"][0]
    facts = rows_of(card_of_checkpoint(early))
    assert facts["measured at step"] == "6"
    assert facts["validation loss (nats per token)"] == f"{of[6, True]['eval_loss']:.4f}"
    assert facts["validation bits per byte"] == f"{of[6, True]['eval_bits_per_byte']:.3f}"
    assert facts["last logged training loss (nats per token)"] == f"{of[8, False]['loss']:.4f}"
    assert facts["logged at step"] == "8"
    assert facts["steps"] == "8 of 12 planned"


def test_a_dataset_that_was_given_is_described(run, tmp_path):
    groundup.train(run / "dataset", tmp_path / "run", **TINY)
    facts = rows_of(card_of_checkpoint(checkpoints(tmp_path / "run")[-1]))
    assert facts["training split"] == rows_of(card_of_checkpoint(checkpoints(run)[-1]))["training split"]


def test_a_folder_from_elsewhere_gets_what_is_known(tmp_path):
    """No step, no data, no result is made up, also where a stranger's files lie beside the folder."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    save_model(GPT2(GPT2Config(vocab_size=9, n_positions=5, n_embd=4, n_layer=1, n_head=1)), folder, end_of_text_id=8)
    (tmp_path / "config.toml").write_text("[run]\nseed = 7\n", encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    card = card_of_checkpoint(folder, weights_from="openai-community/gpt2")
    assert titles(card) == ["Use", "Model"]
    assert "Its weights came from `openai-community/gpt2`." in card
    assert rows_of(card)["width inside the MLP"] == "16"
    assert "license" not in card


def test_fine_tuning_says_where_the_weights_came_from(run):
    card = card_of_checkpoint(checkpoints(run)[-1], weights_from="openai-community/gpt2")
    assert "Its training started from the weights of `openai-community/gpt2`." in card
    assert "random weights" not in card
    options = {
        "configuration": {"initialweights": {"init_from": "a`b", "freeze": ["wte*", "h.[0-5].*"]}},
        "state": {"global_step": 1},
    }
    card = model_card("x", **options)
    assert "started from the weights of `` a`b ``." in card
    assert rows_of(card)["parameters left as they were"] == "`wte*`, `h.[0-5].*`"
    options["configuration"]["initialweights"] = {"init_from": ""}
    assert "started from random weights" in model_card("x", **options)


def test_an_empty_folder_gets_a_card(tmp_path):
    assert titles(card_of_checkpoint(tmp_path)) == ["Use"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"versions": 3, "identity": [], "epoch": "x", "state": null}'])
def test_damaged_files_are_left_out(run, tmp_path, content):
    for name in ("trainer_state.json", "config.json", "model.safetensors"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert set(titles(card_of_checkpoint(tmp_path))) <= {"Use", "Model"}


def test_an_untied_head_and_dropout_are_said():
    card = model_card("x", shape={"n_embd": 8, "tie_word_embeddings": False}, state={"global_step": 1},
                      configuration={"model": {"resid_pdrop": 0.1, "embd_pdrop": 0.0}})  # fmt: skip
    assert rows_of(card)["head"] == "its own matrix"
    assert rows_of(card)["dropout"] == "resid_pdrop 0.1, embd_pdrop 0.0"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"bf16": True}, "bf16"), ({"fp16": True}, "fp16"), ({"bf16": False}, "float32"), ({}, None)],
    ids=str,
)
def test_precision_is_said_where_it_was_chosen(options, said):
    card = model_card("x", configuration={"machine": options | {"seed": 1}}, state={"global_step": 1})
    assert rows_of(card).get("precision") == said


def test_numbers_that_are_not_finite_are_written_as_such():
    card = model_card("x", rows=[{"step": 1, "loss": float("nan"), "eval_loss": None}], state={"global_step": 1})
    assert rows_of(card)["last logged training loss (nats per token)"] == "nan"
    assert "validation loss (nats per token)" not in rows_of(card)


@settings(max_examples=60, deadline=None)
@given(name=st.text(max_size=30), source=st.text(st.characters(codec="utf-8"), max_size=30))
def test_no_name_breaks_the_markdown(name, source):
    """Backticks, pipes, line breaks and markup stay where they are: the sections are the same as for plain names."""
    facts = {
        "configuration": {"sources": [source], "tokenizer": {"tokenizer": source}, "optimizer": {"lr_scheduler_type": source}},
        "dataset": {"request": {"sources": [source], "tokenizer": source or "-"}, "end_of_text": source},
        "state": {"global_step": 1, "versions": {"torch": source}},
        "shape": {"n_layer": 1},
        "weights_from": source,
    }
    card = model_card(name, **facts)
    assert titles(card) == [title for title in SECTIONS if title != "Results"]
    assert card.encode("utf-8").decode("utf-8") == card
    assert "\r" not in card
    assert configuration_in(card)["sources"] == [source]
    heading = card.split("\n---\n\n# ", 1)[1].split("\n", 1)[0]
    assert not re.search(r"[`*_<>\[|]", re.sub(r"\\.", "", heading)), heading
    for line in outside_code(card).splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("a b.txt", "- `a b.txt`"),
        ("a`b", "- `` a`b ``"),
        ("``", "- ``` `` ```"),
        ("two\nlines", r"- `two\nlines`"),
        ("</details>", "- `</details>`"),
        ("\udcff", r"- `\udcff`"),
    ],
    ids=ascii,
)
def test_sources_are_written_as_code(source, written):
    assert written in model_card("x", dataset={"request": {"sources": [source]}}).split("\n")


def test_a_thousand_sources_are_not_all_listed():
    card = model_card("x", dataset={"request": {"sources": [f"{i}.txt" for i in range(1000)]}})
    assert "- and 980 more" in card
    assert "999.txt" not in card


@pytest.mark.slow
def test_the_snippet_for_transformers_runs(run, monkeypatch, capsys):
    card = card_of_checkpoint(checkpoints(run)[-1])
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippet
    monkeypatch.chdir(checkpoints(run)[-1])
    exec(snippet[1].replace("max_new_tokens=100", "max_new_tokens=4"), {})  # noqa: S102 - it is what people paste
    assert "Once" in capsys.readouterr().out
