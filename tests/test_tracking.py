"""Where a run's numbers go: metrics.jsonl, the progress line, the pictures."""

import json
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import groundup
from groundup.tracking.metrics import append_row, number, read_rows, rewind
from groundup.tracking.pictures import draw_curves
from groundup.tracking.progress import duration, progress, step_line
from tests.conftest import TINY

PICTURES = ("loss.png", "perplexity.png")


def step_row(step: int, loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "loss": 5 - step / 10 if loss is None else loss, "num_input_tokens_seen": 128 * step}


def eval_row(step: int, loss: float = 4.0) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss, "num_input_tokens_seen": 128 * step}


ROWS = [eval_row(0, 5.5), *(step_row(step) for step in range(1, 11)), eval_row(10)]


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for row in ROWS:
        append_row(path, row)
    assert read_rows(path) == ROWS
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == ROWS


def test_numbers_that_are_not_finite_become_null(tmp_path):
    """NaN and Infinity are not JSON: other programs must be able to read the file."""
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "eval_loss": -math.inf, "learning_rate": 0.5})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    row = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "eval_loss": None, "learning_rate": 0.5}


@given(text=st.text())
def test_any_text_is_one_row(tmp_path_factory, text):
    """Samples hold whatever a model writes, and some characters look like the end of a line to some programs."""
    path = tmp_path_factory.mktemp("rows") / "samples.jsonl"
    rows = [{"step": 1, "text": text}, {"step": 2, "text": "plain"}]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\r\n"], ids=repr)
def test_a_rewind_keeps_samples_with_odd_line_ends(tmp_path, separator):
    path = tmp_path / "samples.jsonl"
    row = {"step": 1, "text": f"one{separator}two"}
    append_row(path, row)
    rewind(path, 1)
    assert read_rows(path) == [row]


@pytest.mark.parametrize("torn", ['{"step": 3, "loss": 1.', "{", '"step"', "\x00\x00", '{"step": 3, "text": "日'])
def test_a_torn_last_line_is_no_row(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    for row in ROWS[:3]:
        append_row(path, row)
    with path.open("ab") as file:
        file.write(torn.encode()[:-1] if torn.endswith("日") else torn.encode())
    assert read_rows(path) == ROWS[:3]
    rewind(path, 10)
    append_row(path, ROWS[3])
    assert read_rows(path) == ROWS[:4], "the next row starts on a line of its own"


@pytest.mark.parametrize(
    "line",
    ["[" * 200_000, '{"a":' * 100_000, '{"step": "x", "loss": 1}', '{"step": null}', '{"step": 1.5}', '{"step": true}',
     '{"step": -1}', '{"step": 1' + "0" * 400 + "}", '{"step": 1' + "0" * 5000 + "}", "{}", "[3]"],
    ids=lambda line: line[:20],
)  # fmt: skip
def test_what_is_no_row_is_passed_over(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    append_row(path, ROWS[0])
    with path.open("a") as file:
        file.write(line + "\n")
    append_row(path, ROWS[1])
    assert read_rows(path) == ROWS[:2]
    rewind(path, 10)
    assert read_rows(path) == ROWS[:2]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (-2.5, -2.5),
        (0, 0.0),
        *((odd, None) for odd in (10**400, 1.7e308, -(10**400), math.inf, math.nan, True, "1", None, [1])),
    ],
    ids=str,
)
def test_a_number_is_finite_and_can_be_reckoned_with(value, expected):
    assert math.isnan(number(value)) if expected is None else number(value) == expected


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []
    rewind(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "left"), [(0, 1), (4, 5), (10, 12), (99, 12)])
def test_rewind_drops_what_comes_after(tmp_path, step, left):
    path = tmp_path / "metrics.jsonl"
    for row in ROWS:
        append_row(path, row)
    rewind(path, step)
    assert read_rows(path) == ROWS[:left]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0s"), (0.4, "0s"), (42, "42s"), (59.4, "59s"), (59.6, "1m00s"), (60, "1m00s"), (185, "3m05s"), (3599, "59m59s"),
     (3599.9, "1h00m"), (3600, "1h00m"), (7800, "2h10m"), (360_000, "100h00m")],
)  # fmt: skip
def test_durations_as_people_say_them(seconds, words):
    assert duration(seconds) == words


LOGGED = {
    "step": 1500, "loss": 3.14159, "learning_rate": 6e-4, "grad_norm": 0.456, "tokens_per_second": 12345.6, "mfu": 0.3456,
}  # fmt: skip


def test_the_progress_line():
    expected = "step  1,500/2,000 (75.0%) | loss 3.1416 | lr 6.00e-04 | norm 0.46 | 12,346 tok/s | mfu 34.6% | eta 3m05s"
    assert step_line(LOGGED, 2000, 185) == expected
    assert step_line(LOGGED | {"skipped_steps": 2}, 2000, 185) == expected + " | 2 skipped"
    assert step_line(LOGGED | {"skipped_steps": 0}, 2000, 185) == expected


def test_the_progress_line_of_a_skipped_step():
    """Rows go into the line as they are, before null takes the place of NaN."""
    assert "loss nan" in step_line(LOGGED | {"loss": math.nan}, 2000, 0)


def test_progress_goes_to_standard_error_line_by_line(capsys):
    with progress() as shown:
        shown.say("said [bold]as it is[/bold] :smile: " + "long " * 100)
        shown.step("step 1")
        shown.step("step 2")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["said [bold]as it is[/bold] :smile: " + ("long " * 100), "step 1", "step 2"]


def draw(rows: list[dict[str, Any]], folder: Path, title: str = "run") -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        draw_curves(rows, folder, title)
    assert sorted(path.name for path in folder.iterdir()) == sorted(PICTURES), "pictures, and nothing beside them"
    return {name: (folder / name).read_bytes() for name in PICTURES}


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82"), "whole"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_both_pictures_are_drawn(tmp_path):
    pictures = draw(ROWS, tmp_path / "run")
    assert [size_of(png) for png in pictures.values()] == [(960, 576), (960, 576)]
    assert pictures["loss.png"] != pictures["perplexity.png"]


def test_pictures_show_the_rows(tmp_path):
    """The same rows give the same picture; another value in training or in validation, another picture."""
    first = draw(ROWS, tmp_path / "run")
    assert draw(ROWS, tmp_path / "run") == first
    for changed in ([*ROWS[:-1], eval_row(10, 3.0)], [*ROWS[:5], step_row(5, 9.0), *ROWS[6:]], [*ROWS, step_row(11)]):
        again = draw(changed, tmp_path / "run")
        assert again["loss.png"] != first["loss.png"]
        assert again["perplexity.png"] != first["perplexity.png"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [eval_row(0)],
        [step_row(1)],
        [step_row(1), eval_row(1)],
        [step_row(1), {"step": 2, "loss": None, "grad_norm": None, "num_input_tokens_seen": 256}, step_row(3)],
        [step_row(1, 1e6), eval_row(1, 1e6)],
        [step_row(1, 0.0), eval_row(1, 0.0)],
    ],
    ids=["nothing", "before training", "one step", "no evaluation before", "a skipped step", "a huge loss", "no loss at all"],
)
def test_any_run_can_be_drawn(tmp_path, rows):
    assert size_of(draw(rows, tmp_path / "run")["loss.png"]) == (960, 576)


@pytest.mark.parametrize("title", ["$\\frac$", "a$b$c^", "100% _x_ {y}", "日本", "", "x" * 300], ids=repr)
def test_any_folder_name_is_a_title(tmp_path, title):
    """Not a formula: a folder may have dollars in its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a font without these letters draws boxes
        assert size_of(draw(ROWS, tmp_path / "run", title)["loss.png"])[1] == 576


def test_a_run_leaves_its_curves_and_samples(text_file, tmp_path):
    groundup.train(text_file, tmp_path / "run", **TINY | {"max_steps": 1, "eval_steps": 1, "sample_prompt": "the "})
    for name in PICTURES:
        assert size_of((tmp_path / "run" / name).read_bytes()) == (960, 576)
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [(0, "the "), (1, "the ")]
    assert all(isinstance(row["text"], str) for row in samples)


def test_rows_have_hugging_faces_keys(text_file, tmp_path):
    groundup.train(
        text_file, tmp_path / "run", **TINY | {"max_steps": 5, "eval_steps": 5, "logging_steps": 2, "sample_tokens": 0}
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    training, validation = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [row["step"] for row in training if row["step"] % 2 == 0] == [2, 4]
    assert training[-1]["step"] == 5, "the last step is always logged"
    assert [row["step"] for row in validation] == [0, 5]
    assert {"epoch", "grad_norm", "learning_rate", "num_input_tokens_seen", "tokens_per_second", "batch_digest"} <= set(
        training[0]
    )
    assert {"epoch", "eval_perplexity", "eval_bits_per_byte", "num_input_tokens_seen"} <= set(validation[0])
    assert [row["num_input_tokens_seen"] for row in training] == [128 * row["step"] for row in training]
