"""What a report says of a run: read from its files, as they are, torn and hostile ones among them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import groundup
from groundup.data.sources import RUN_HEADER
from groundup.recipes.report import findings
from groundup.reporting.data import HEALTH_BLOCKS, HEALTH_MEASURES, POINTS, RunReader, labels_of, page_data, run_data
from groundup.reporting.rows import KEPT_HEALTH, Metrics, Tail
from groundup.reporting.thin import chosen, rounded, smoothed
from groundup.reporting.totals import still_falling
from groundup.runtime.files import exclusive, replace_durably
from groundup.tracking.metrics import append_row, rewind
from tests.conftest import TINY, make_text


def step_row(step: int, loss: float | None = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 100,
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "num_input_tokens_seen": 1000 * step,
        "tokens_per_second": 500.0,
        "mfu": 0.1,
        "batch_digest": "d",
        **more,
    }


def eval_row(step: int, loss: float | None) -> dict[str, Any]:
    bits = None if loss is None else loss / math.log(2) / 4
    return {
        "step": step,
        "epoch": step / 100,
        "eval_loss": loss,
        "eval_perplexity": None if loss is None else math.exp(loss),
        "eval_bits_per_byte": bits,
        "eval_token_accuracy": 0.5,
        "eval_tokens": 99,
        "num_input_tokens_seen": 1000 * step,
    }


def make_run(run: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """A run's folder with these rows, of 100 steps if nothing else is said."""
    run.mkdir(parents=True, exist_ok=True)
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in ({"max_steps": 100} | options).items())
    (run / "config.toml").write_text(f"{RUN_HEADER} 0)\n[run]\n{settings}\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


def course(losses: list[float], evaluations: dict[int, float], total: int = 100) -> list[dict[str, Any]]:
    """The rows of a run: training losses spread over its steps, and evaluations by step."""
    rows = [step_row(round((index + 1) * total / len(losses)), loss) for index, loss in enumerate(losses)]
    return sorted([*rows, *(eval_row(step, loss) for step, loss in evaluations.items())], key=lambda row: row["step"])


def falling(start: float, end: float, count: int = 50) -> list[float]:
    return list(np.linspace(start, end, count))


# --- reading a file that grows ---


def test_a_tail_reads_on_from_where_it_was(tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    tail = Tail(path)
    anew, rows = tail.rows()
    assert [row["step"] for row in rows] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}')  # whole, but for its line break
    anew, rows = tail.rows()
    assert (anew, [row["step"] for row in rows]) == (False, [3])
    with path.open("a") as file:
        file.write('\n{"step": 4}\n')
    assert [row["step"] for row in tail.rows()[1]] == [4]
    assert list(tail.rows()[1]) == []


def test_a_tail_notices_that_the_file_was_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_row(path, step_row(step))
    tail = Tail(path)
    assert len(list(tail.rows()[1])) == 5
    # Shorter, as after going back; then as long as before with other content.
    rewind(path, 2)
    anew, rows = tail.rows()
    assert (anew, [row["step"] for row in rows]) == (True, [1, 2])
    content = path.read_bytes()
    replace_durably(path, content.replace(b'"step": 2', b'"step": 7'))
    anew, rows = tail.rows()
    assert (anew, [row["step"] for row in rows]) == (True, [1, 7])
    path.unlink()
    anew, rows = tail.rows()
    assert (anew, list(rows)) == (True, [])


def test_steps_that_are_written_again_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [
                step_row(1),
                step_row(2),
                eval_row(2, 3.0),
                step_row(3, None),
                step_row(4),
                step_row(3, 1.5),
                step_row(4, 1.25),
            ]
        )
    )
    metrics = Metrics(path)
    metrics.read()
    assert list(metrics.steps["step"]) == [1, 2, 3, 4]
    assert list(metrics.steps["loss"]) == [2.0, 2.0, 1.5, 1.25]
    assert metrics.skipped == []
    assert len(metrics.evaluations) == 1


def test_time_follows_from_tokens_and_speed(tmp_path):
    run = make_run(
        tmp_path / "run", [step_row(step, tokens_per_second=speed) for step, speed in ((1, 500.0), (2, 250.0), (4, 1000.0))]
    )
    # 1,000 tokens at 500 a second, 1,000 at 250, 2,000 at 1,000
    assert run_data(run)["train"]["seconds"] == [2, 6, 8]


def test_health_of_a_very_long_run_is_thinned(tmp_path):
    rows = [step_row(step, health={"grad_norm": {"h.0": float(step)}}) for step in range(1, 2 * KEPT_HEALTH + 100)]
    metrics = Metrics(make_run(tmp_path / "run", rows) / "metrics.jsonl")
    metrics.read()
    assert KEPT_HEALTH // 2 <= len(metrics.health) <= KEPT_HEALTH
    steps = [step for step, _ in metrics.health]
    assert steps == sorted(steps)
    assert steps[-1] > 2 * KEPT_HEALTH


# --- fewer points ---


@settings(max_examples=60)
@given(st.lists(st.one_of(st.floats(-10, 10), st.just(math.nan)), min_size=1, max_size=400), st.integers(10, 120))
def test_thinning_keeps_extremes_and_the_ends(values, points):
    column = np.array(values)
    other = -column[::-1]
    kept = chosen([column, other], points)
    assert len(kept) <= points
    assert list(kept) == sorted(set(kept))
    assert kept[-1] == len(values) - 1
    assert kept[0] == 0
    for one in (column, other):
        if not np.isnan(one).all():
            assert np.nanmin(one[kept]) == np.nanmin(one)
            assert np.nanmax(one[kept]) == np.nanmax(one)


def test_one_spike_among_many_steps_is_drawn(tmp_path):
    rows = [step_row(step, 99.0 if step == 1234 else 2.0 + step % 7 / 10) for step in range(1, 5001)]
    train = run_data(make_run(tmp_path / "run", rows))["train"]
    assert len(train["step"]) <= POINTS
    assert train["loss"][train["step"].index(1234)] == 99


def test_smoothing_is_the_mean_around():
    values = np.array([1.0, 2.0, 3.0, math.nan, 5.0, 9.0, 1.0])
    assert smoothed(values, 3).tolist() == [1.0, 2.0, 2.5, 4.0, 7.0, 5.0, 1.0]
    assert smoothed(np.array([]), 5).tolist() == []
    assert math.isnan(smoothed(np.array([math.nan]), 5)[0])


def test_numbers_are_rounded_to_digits_that_count():
    assert rounded([1.23456789, 1e-9 / 3, 123456789.0, math.nan, math.inf, 2.0]) == [
        1.23457,
        3.33333e-10,
        123456789,
        None,
        None,
        2,
    ]


# --- how a run went ---


def test_a_loss_that_still_falls_is_told_from_one_that_stands():
    assert still_falling([(25, 4.0), (50, 3.0), (75, 2.5), (100, 2.2)]) is True
    assert still_falling([(25, 4.0), (50, 3.0), (75, 2.5), (100, 2.49)]) is False
    assert still_falling([(50, 3.0), (100, 2.0)]) is None


GOOD_COURSE = course(falling(5, 2), {25: 4.0, 50: 3.0, 75: 2.5, 100: 2.2})
FLAT_COURSE = course(falling(5, 2), {25: 2.6, 50: 2.4, 75: 2.3, 100: 2.295})
OVERFITTED = course(falling(5, 0.5), {25: 3.0, 50: 2.5, 75: 2.8, 100: 3.2})
CLIMBED = course([*falling(5, 2, 60), *falling(3, 7, 40)], {25: 3.5, 50: 2.9, 75: 4.0, 100: 7.0})
DIVERGED = [
    *course(falling(5, 3), {}, 60),
    *(step_row(step, None, grad_norm=None, skipped_steps=step - 60) for step in range(61, 71)),
]


@pytest.mark.parametrize(
    ("rows", "tone", "headline", "advice"),
    [
        (GOOD_COURSE, "good", "Finished 100 steps, loss 2.200 on validation.", "train longer"),
        (FLAT_COURSE, "good", "Finished 100 steps, loss 2.295 on validation.", "longer training will bring little"),
        (
            OVERFITTED,
            "warning",
            "Learned, then overfitted: best at step 50 of 100, validation loss 2.500.",
            "--load-best-model-at-end",
        ),
        (CLIMBED, "bad", "Went wrong after step", "lower --learning-rate (now 0.5)"),
        (
            DIVERGED,
            "bad",
            "Diverged at step 70: its last steps had no finite loss or gradient.",
            "lower --learning-rate (now 0.5)",
        ),
        (
            course(falling(5, 0.5), {0: 4.0, 50: 4.5, 100: 5.0}),
            "bad",
            "Learned nothing that holds for other text: validation loss was lowest at step 0, 4.000, and is 5.000 at step 100.",
            "run `groundup doctor`",
        ),
        (GOOD_COURSE[:20], "warning", "Stopped at", "the same command goes on"),
        (course(falling(5, 2), {}), "good", "Finished 100 steps, loss 2.122 on training text.", "Set --eval-steps"),
        ([], "plain", "This run holds no logged step", "Start it again"),
        ([eval_row(0, 5.5)], "warning", "Stopped at 0 of 100 steps, loss 5.500 on validation.", "the same command"),
    ],
    ids=[
        "good",
        "flat",
        "overfitted",
        "climbed",
        "diverged",
        "never-better",
        "stopped",
        "unevaluated",
        "empty",
        "first-evaluation",
    ],
)
def test_the_first_line_says_how_it_went_and_another_what_to_do(tmp_path, rows, tone, headline, advice):
    story = run_data(make_run(tmp_path / "run", rows, learning_rate=0.5))["story"]
    assert story[0]["tone"] == tone
    assert story[0]["text"].startswith(headline)
    assert any(advice in line["text"] for line in story[1:])
    assert {line["tone"] for line in story} <= {"good", "warning", "bad", "plain"}


def test_a_noisy_training_loss_with_a_falling_validation_loss_did_not_climb(tmp_path):
    """A loss is of one batch: few of them may rise by chance."""
    rows = course([5, 3, 4, 2.5, 2, 2, 4.9, 5.2, 4.8, 5.0], {25: 4.9, 50: 4.8, 75: 4.7, 100: 4.6})
    assert run_data(make_run(tmp_path / "run", rows))["totals"]["climbed"] is None


def test_a_run_that_goes_on_is_told_by_its_lock(tmp_path):
    run = make_run(tmp_path / "run", GOOD_COURSE[:20])
    assert run_data(run)["state"]["running"] is False
    with exclusive(run / ".lock", "test"):
        found = run_data(run)
    assert found["state"]["running"] is True
    assert found["story"][0]["text"].startswith("Going on: ")
    assert any("to go" in line["text"] for line in found["story"])
    assert run_data(run)["state"]["running"] is False


def test_what_was_unusual_is_listed_in_order(tmp_path):
    spike = {
        "loss": {"value": 9.0, "median": 2.0, "score": 30.0},
        "grad_norm": {"value": 3.0, "median": 1.0, "score": 2.0},
        "threshold": 8.0,
        "steps": 100,
    }
    run = make_run(tmp_path / "run", [step_row(1), step_row(5, 9.0, spike=spike), step_row(9, None), step_row(20)])
    (run / "spikes").mkdir()
    (run / "spikes" / "step-000005.txt").write_text("text")
    (run / "left_out.jsonl").write_text('{"step": 12, "first_sample": 0, "samples": 8, "loss": 9.0, "grad_norm": 5.5}\n')
    (run / "starts.jsonl").write_text(
        '{"step": 0, "time": "t0", "machine": "cpu", "versions": {"torch": "9"}}\n'
        '{"step": 15, "time": "t1", "machine": "gpu", "versions": {"torch": "9"}}\n'
    )
    (run / "checkpoint-15.corrupt-1").mkdir()
    found = run_data(run)
    assert [(event["step"], event["kind"]) for event in found["events"]] == [
        (5, "spike"),
        (9, "skipped"),
        (12, "rollback"),
        (15, "resume"),
        (15, "damaged"),
    ]
    assert found["events"][0]["text"] == "loss 9, usually 2; its text is in spikes/step-000005.txt"
    assert found["machine"]["machine"] == "gpu"
    unusual = next(line["text"] for line in found["story"] if line["text"].startswith("Unusual"))
    for part in ("1 step was skipped", "1 spike", "went back", "interrupted"):
        assert part in unusual


# --- files as they are ---


def test_torn_rows_and_nonsense_are_passed_over(tmp_path):
    run = make_run(tmp_path / "run", [])
    good = [json.dumps(step_row(step)) for step in (1, 2, 3)]
    nonsense = [
        '{"step": 2, "lo',
        "null",
        "[1]",
        '"x"',
        "9" * 5000,
        '{"step": "5", "loss": 1}',
        '{"step": true, "loss": 1}',
        '{"step": -4, "loss": 1}',
        '{"step": 1e300, "loss": 1}',
        "[" * 100_000,
    ]
    odd = [
        '{"step": 4, "loss": NaN, "grad_norm": 1e999, "tokens_per_second": "fast"}',
        '{"step": 5, "loss": {"a": 1}, "health": [1]}',
        '{"step": 6, "loss": ' + "9" * 400 + ', "health": {"x": 3, "grad_norm": {"h.0": "a", "h.1": NaN, "h.2": null}}}',
        '{"step": 6, "eval_loss": null}',
        '{"step": 6, "eval_loss": "x"}',
    ]
    content = "\n".join([good[0], *nonsense, good[1], good[2], *odd]) + "\n" + good[0][:30]
    (run / "metrics.jsonl").write_bytes(content.encode() + b"\xff\xfe")
    (run / "samples.jsonl").write_text('{"step": 1, "text": 5}\n{"step": 2, "prompt": null, "text": "ok"}\n{"te')
    (run / "left_out.jsonl").write_text('{"step": "x", "loss": "y"}\n')
    (run / "starts.jsonl").write_text('{"step": NaN, "versions": {"a": NaN}}\n{"step": [], "versions": 3}\n')
    (run / "dataset").mkdir()
    (run / "dataset" / "dataset.json").write_text(
        '{"splits": {"train": {"tokens": "many"}, "x": 3}, "vocab_size": NaN, "bytes": 1e999}'
    )
    data = page_data([run_data(run)])
    json.dumps(data, allow_nan=False)
    assert data["runs"][0]["train"]["step"] == [1, 2, 3, 4, 5, 6]
    assert [sample["text"] for sample in data["runs"][0]["samples"]] == ["ok"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff" * 50, b"a = = b", b"sources = 3\nmax_steps = nan\nlearning_rate = inf\n", b"[a]\nx = 1979-05-27\n"],
)
def test_any_configuration_is_survived(tmp_path, content):
    run = make_run(tmp_path / "run", GOOD_COURSE)
    (run / "config.toml").write_bytes(content)
    (shown,) = json.loads(json.dumps(page_data([run_data(run)]), allow_nan=False))["runs"]
    assert (
        shown["train"]["step"] == page_data([run_data(make_run(run.parent / "whole", GOOD_COURSE))])["runs"][0]["train"]["step"]
    )
    assert shown["story"][0]["text"]


HUGE = "1" + "0" * 400


@pytest.mark.filterwarnings("error")
def test_whole_numbers_without_end_are_none(tmp_path):
    run = make_run(tmp_path / "run", GOOD_COURSE)
    row = f'{{"step": 101, "loss": {HUGE}, "grad_norm": {HUGE}, "num_input_tokens_seen": {HUGE}, "eval_loss": {HUGE}, '
    row += f'"health": {{"norm": {{"h.0": {HUGE}, "h.1": 1.7e308}}}}}}\n'
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + row)
    (run / "config.toml").write_text(f"{RUN_HEADER} 0)\nmax_steps = {HUGE}\nlearning_rate = {HUGE}\nmax_grad_norm = {HUGE}\n")
    (run / "dataset").mkdir()
    counts = f'{{"tokens": {HUGE}, "bytes": 1, "documents": 1}}'
    (run / "dataset" / "dataset.json").write_text(f'{{"vocab_size": 300, "splits": {{"train": {counts}}}}}')
    (run / "starts.jsonl").write_text(f'{{"step": 0}}\n{{"step": {HUGE}}}\n')
    (run / "samples.jsonl").write_text(f'{{"step": {HUGE}, "text": "a"}}\n')
    data = run_data(run)
    json.dumps(findings(run, data), allow_nan=False)
    assert HUGE not in json.dumps(data, allow_nan=False)
    assert data["health"]["measures"]["norm"]["values"] == [[None], [None]]
    assert data["config"]["learning_rate"] is None
    assert data["data"]["splits"]["train"]["tokens"] is None


@pytest.mark.parametrize("name", ["checkpoint-².corrupt-1", "checkpoint-" + "9" * 200 + ".corrupt-2", "checkpoint-x.corrupt-1"])
def test_a_folder_with_an_odd_number_is_set_aside_all_the_same(tmp_path, name):
    run = make_run(tmp_path / "run", GOOD_COURSE)
    (run / name).mkdir()
    event = next(event for event in run_data(run)["events"] if event["kind"] == "damaged")
    assert event["step"] == 0
    assert name in event["text"]


def test_health_without_end_is_bounded_and_an_empty_measure_is_none(tmp_path):
    blocks = {f"h.{block}": block for block in range(5000)}
    health = {"empty": {}, "large": blocks, **{f"m{index}": {"h.0": 1} for index in range(500)}}
    found = run_data(make_run(tmp_path / "run", [step_row(step, health=health) for step in (1, 2)]))["health"]["measures"]
    assert "empty" not in found
    assert len(found) == HEALTH_MEASURES
    assert len(found["large"]["blocks"]) == len(found["large"]["values"]) == HEALTH_BLOCKS
    assert (found["large"]["blocks"][0], found["large"]["blocks"][-1]) == ("h.0", "h.4999")


def test_reading_on_gives_what_reading_at_once_gives(tmp_path):
    run = make_run(tmp_path / "run", [])
    reader = RunReader(run)
    rows = [*GOOD_COURSE, *(step_row(100 + step, health={"grad_norm": {"h.0": 1.0}}) for step in range(1, 4))]
    for row in rows:
        append_row(run / "metrics.jsonl", row)
        reader.data()
    rewind(run / "metrics.jsonl", 60)
    append_row(run / "metrics.jsonl", step_row(70, 1.0))
    assert reader.data() == run_data(run)
    assert reader.data()["train"]["step"][-1] == 70


def test_runs_of_the_same_name_are_told_apart():
    assert labels_of(["a/run", "b/run", "c/other"]) == ["a/run", "b/run", "other"]
    assert labels_of(["x/a/run", "y/a/run", "run"]) == ["x/a/run", "y/a/run", labels_of(["run", "x/a/run"])[0]]
    assert labels_of(["run"]) == ["run"]


def test_what_differs_is_compared_and_losses_of_other_vocabularies_are_not(tmp_path):
    one = run_data(make_run(tmp_path / "one", GOOD_COURSE, learning_rate=0.1, same=1, source=[]))
    two = run_data(make_run(tmp_path / "two", OVERFITTED, learning_rate=0.2, same=1, seed=3))
    found = page_data([one, two])["differences"]
    assert [(row["name"], row["values"]) for row in found["config"]] == [("learning_rate", [0.1, 0.2]), ("seed", [None, 3])]
    best = {row["name"]: row["best"] for row in found["results"]}
    assert best["best validation loss"] == 0
    assert page_data([two, one])["verdict"] == "Best: one, with 0.793 bits per byte on validation; two 0.902."
    assert "Fewer than two" in page_data([one, run_data(make_run(tmp_path / "three", []))])["verdict"]
    assert best["skipped steps"] is None
    two["data"] = {"vocab_size": 99}
    best = {row["name"]: row["best"] for row in page_data([one, two])["differences"]["results"]}
    assert best["best validation loss"] is None
    assert best["… bits per byte"] == 0


# --- a real run ---


@pytest.mark.usefixtures("quick")
def test_a_real_run_is_read_whole(tmp_path):
    (tmp_path / "text.txt").write_text(make_text(), encoding="utf-8")
    run = tmp_path / "run"
    groundup.train(tmp_path / "text.txt", run, **TINY, health_steps=4)
    found = run_data(run)
    assert found["train"]["step"] == list(range(1, 13))
    assert found["evaluations"]["step"] == [0, 6, 12]
    assert found["state"] == found["state"] | {"running": False, "planned_steps": 12}
    assert found["health"]["steps"] == [4, 8, 12]
    assert found["health"]["measures"]["dead_units"]["blocks"] == ["h.0", "h.1"]
    assert [sample["step"] for sample in found["samples"]] == [0, 6, 12]
    assert found["config"]["n_embd"] == 16
    assert found["data"]["vocab_size"] == 257
    assert found["tokens_per_byte"] == pytest.approx(1, abs=0.01)
    assert "cpu" in found["machine"]["machine"]
    assert set(found["machine"]["versions"]) == {"groundup", "torch", "python"}
    assert found["events"] == []
    # Going on is written down; a call that has nothing to do is none.
    groundup.train(tmp_path / "text.txt", run, **TINY, health_steps=4)
    assert run_data(run)["totals"]["resumes"] == 0
    groundup.train(tmp_path / "text.txt", run, **TINY | {"max_steps": 14}, health_steps=4)
    found = run_data(run)
    assert [(event["kind"], event["step"]) for event in found["events"]] == [("resume", 12)]
