"""The schedules, against tables by hand, formulas from papers and transformers; and how they are drawn."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groundup.errors import ConfigError
from groundup.optim.schedule import Schedule
from groundup.recipes.schedule import draw, schedule_points
from groundup.tracking.schedule_picture import LINES, MARKERS, bars, schedule_text
from tests.conftest import groundup as command

# By hand: peak 1, 4 steps of warmup, 12 in all; p = (step − 5) / 8. A tenth is the floor, power 2, and the last 4 decay.
STEPS = range(1, 13)
WARMUP = [0.25, 0.5, 0.75, 1.0]
COSINE = [(1 + math.cos(math.pi * p / 8)) / 2 for p in range(8)]
TABLES = {
    "constant": [1.0] * 12,
    "constant_with_warmup": [*WARMUP, *[1.0] * 8],
    "linear": [*WARMUP, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [*WARMUP, *COSINE],
    "cosine_with_min_lr": [*WARMUP, *[0.1 + 0.9 * value for value in COSINE]],
    "polynomial": [*WARMUP, *[0.1 + 0.9 * value for value in (1, 49 / 64, 36 / 64, 25 / 64, 16 / 64, 9 / 64, 4 / 64, 1 / 64)]],
    "inverse_sqrt": [*WARMUP, *[2 / math.sqrt(step) for step in range(5, 13)]],
    "warmup_stable_decay": [*[0.1 + 0.9 * value for value in WARMUP], 1, 1, 1, 1, 1, 0.775, 0.55, 0.325],
}
FLOORS = {
    "constant": 1.0, "constant_with_warmup": 1.0, "cosine_with_min_lr": 0.1, "polynomial": 0.1, "warmup_stable_decay": 0.1,
}  # fmt: skip


def schedule(kind: str, peak: float = 1.0, warmup: int = 4, total: int = 12, floor: float = 0.1, **options: Any) -> Schedule:
    options = {"power": 2.0, "decay_steps": 4, "decay_type": "linear"} | options
    return Schedule(kind, peak, warmup, total, floor, **options)


def rates(kind: str, steps: Any = STEPS, **options: Any) -> list[float]:
    return [schedule(kind, **options).learning_rate_at(step) for step in steps]


@pytest.mark.parametrize("kind", list(TABLES))
def test_each_schedule_by_hand(kind):
    assert rates(kind) == pytest.approx(TABLES[kind], abs=1e-12)
    assert rates(kind, peak=3e-4) == pytest.approx([3e-4 * rate for rate in TABLES[kind]], abs=1e-15)


def test_some_values_of_the_cosine_by_hand():
    assert rates("cosine", [9, 7]) == pytest.approx([0.5, (1 + math.sqrt(0.5)) / 2])
    assert rates("cosine_with_min_lr", [9]) == pytest.approx([0.55])


def test_the_three_falls_of_warmup_stable_decay_by_hand():
    def last(decay_type: str) -> list[float]:
        return rates("warmup_stable_decay", range(9, 13), floor=0.0, decay_type=decay_type)

    assert last("linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert last("cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert last("1-sqrt") == pytest.approx([1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


@pytest.mark.parametrize("kind", [kind for kind in TABLES if kind != "inverse_sqrt"])
def test_after_the_planned_end_the_rate_stays_at_its_floor(kind):
    assert rates(kind, (13, 14, 1000)) == pytest.approx([FLOORS.get(kind, 0.0)] * 3, abs=1e-12)


@pytest.mark.parametrize("kind", list(TABLES))
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (1, 1), (10, 10), (20, 10)])
@pytest.mark.parametrize("decay_steps", [0, 1, 30])
def test_short_runs_and_long_warmups_are_defined(kind, warmup, total, decay_steps):
    found = rates(kind, range(1, total + 30), warmup=warmup, total=total, floor=0.0, decay_steps=decay_steps)
    assert all(0 <= rate <= 1 for rate in found)
    if kind == "constant":
        assert set(found) == {1.0}
    elif warmup or kind != "inverse_sqrt":
        assert found[0] == (1.0 if warmup == 0 else 1 / warmup)
        assert found[:warmup] == pytest.approx([(i + 1) / warmup for i in range(min(warmup, total + 29))])


def test_a_decay_that_does_not_fit_starts_after_warmup():
    assert rates("warmup_stable_decay", decay_steps=100) == rates("warmup_stable_decay", decay_steps=8)
    assert rates("warmup_stable_decay", decay_steps=8)[4:6] == pytest.approx([1, 1 - 0.9 / 8])


@pytest.mark.parametrize("scale", [1.0, 512**-0.5])
@pytest.mark.parametrize("warmup", [0, 1, 7, 4000])
def test_inverse_sqrt_with_its_own_constant(scale, warmup):
    """Vaswani et al. 2017, eq. 3, with C for d_model^−0.5; neither the peak nor the length of the run has a say."""
    steps = [1, 2, 6, 7, 8, 100, 3999, 4000, 4001, 10**6]
    found = rates("inverse_sqrt", steps, warmup=warmup, scale=scale, peak=123.0, total=5)
    if warmup:
        assert found == [scale * min(1 / math.sqrt(s), s / warmup**1.5) for s in steps]
    else:
        assert found == [scale / math.sqrt(s) for s in steps]


@pytest.mark.parametrize("warmup", [1, 10, 4000])
def test_the_constant_of_inverse_sqrt_is_the_one_that_peaks_at_the_learning_rate(warmup):
    steps = [1, 5, warmup, warmup + 1, 10 * warmup]
    own = rates("inverse_sqrt", steps, warmup=warmup, scale=6e-4 * math.sqrt(warmup), peak=1.0)
    assert rates("inverse_sqrt", steps, warmup=warmup, peak=6e-4) == pytest.approx(own, rel=1e-12)
    assert rates("inverse_sqrt", [warmup], warmup=warmup, peak=6e-4) == [6e-4]


def transformers_factor(kind: str, warmup: int, total: int, setting: Schedule) -> Any:
    """The factor on the peak that transformers' scheduler of the same name gives, steps counted from 0."""
    from transformers import get_scheduler

    extra = {
        "cosine_with_min_lr": {"min_lr_rate": setting.min_rate},
        "polynomial": {"lr_end": setting.min_rate * setting.peak, "power": setting.power},
        "warmup_stable_decay": {
            "num_decay_steps": setting.decay_steps, "decay_type": setting.decay_type, "min_lr_ratio": setting.min_rate,
        },
    }.get(kind)  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=setting.peak)
    return get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=extra).lr_lambdas[0]


@pytest.mark.parametrize("kind", list(TABLES))
def test_every_step_of_random_runs_is_that_of_transformers(kind):
    """
    Their warmup wastes its first step on a rate of 0; ours does not: in it our step s is their s, after it their s − 1.

    Of inverse_sqrt it is their s throughout, which is the paper's.
    """
    draws = random.Random(f"schedule {kind}")
    for _ in range(200):
        total = draws.randint(2, 60)
        warmup = draws.choice([0, draws.randint(0, total - 1)])
        setting = Schedule(
            kind, 10 ** draws.uniform(-5, 0), warmup, total, draws.choice([0.0, draws.uniform(0, 0.99)]),
            power=draws.choice([0.5, 1.0, 2.0, draws.uniform(0.1, 4)]), decay_steps=draws.randint(0, total - warmup),
            decay_type=draws.choice(["linear", "cosine", "1-sqrt"]),
        )  # fmt: skip
        theirs = transformers_factor(kind, warmup, total, setting)
        ours = [setting.learning_rate_at(step) for step in range(1, total + 1)]
        shift = [0 if step <= warmup or kind == "inverse_sqrt" else 1 for step in range(1, total + 1)]
        expected = [setting.peak * theirs(step - back) for step, back in enumerate(shift, 1)]
        assert ours == pytest.approx(expected, rel=1e-12, abs=1e-12 * setting.peak), setting


def test_points_are_few_and_hold_the_ends_and_the_corners():
    long = schedule("warmup_stable_decay", warmup=12_345, total=1_000_000, decay_steps=200_000)
    points = schedule_points(long, 500)
    steps = [step for step, _ in points]
    assert 500 <= len(points) <= 510
    assert steps == sorted(set(steps))
    assert {1, 12_345, 12_346, 800_001, 1_000_000} <= set(steps)
    assert all(rate == long.learning_rate_at(step) for step, rate in points)
    assert [step for step, _ in schedule_points(schedule("linear"), 500)] == list(STEPS)
    assert [step for step, _ in schedule_points(schedule("linear", warmup=3, total=1), 500)] == [1]


def test_bars_show_a_curve_and_zero_is_empty():
    assert bars([0.0, 0.01, 0.5, 1.0], 1.0) == " ▁▄█"
    assert bars([x / 8 for x in range(9)], 1.0) == " ▁▂▃▄▅▆▇█"
    assert bars([3 * 0.1, 0.3], 0.3) == "██"
    assert bars([0.0], 0.0) == " "


def test_a_drawing_says_where_each_schedule_starts_peaks_and_ends(tmp_path: Path):
    path = tmp_path / "new" / "schedule.png"
    result = draw({"linear": schedule("linear", peak=6e-4), "constant": schedule("constant", peak=3e-4)}, path)
    linear, constant = result["schedules"]
    assert [linear[key] for key in ("name", "first", "peak", "peak_step", "last")] == ["linear", 1.5e-4, 6e-4, 4, 7.5e-5]
    assert linear["points"] == [[step, 6e-4 * rate] for step, rate in zip(STEPS, TABLES["linear"], strict=True)]
    assert [constant["first"], constant["peak_step"], constant["last"]] == [3e-4, 1, 3e-4]
    assert (result["steps"], result["picture"]) == (12, str(path))
    assert json.loads(json.dumps(result)) == result
    assert path.read_bytes().startswith(b"\x89PNG")
    assert schedule_text(result).splitlines() == [
        "linear    │▂▄▆██▇▆▅▄▃▂▁│  0.00015 → 0.0006 at step 4 → 7.5e-05",
        "constant  │▄▄▄▄▄▄▄▄▄▄▄▄│  0.0003 → 0.0003 at step 1 → 0.0003",  # one scale for all
    ]


def test_a_long_run_is_as_wide_in_a_terminal_as_a_short_one():
    longs = {name: schedule(name, warmup=1000, total=10_000) for name in ("cosine", "warmup_stable_decay")}
    cosine, stable = (line.split("│")[1] for line in schedule_text(draw(longs)).splitlines())
    assert len(cosine) == len(stable) == 40
    assert cosine[:5] == "▁▃▅▇█"  # a tenth of the run is warmup
    assert stable[:5] == "▂▄▆██"  # from a tenth of the peak
    assert set(stable[5:]) == {"█"}
    assert list(cosine[5:]) == sorted(cosine[5:], reverse=True)
    assert cosine[-1] == "▁"


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert draw({"cosine": schedule("cosine")})["picture"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        draw({"cosine": schedule("cosine")}, tmp_path / "file" / "a.png")


def test_names_with_dollars_and_underscores_are_drawn_as_they_are(tmp_path: Path):
    """matplotlib reads dollars as mathematics, and leaves labels that start with an underscore out of the legend."""
    kinds = {"_a": "cosine", "$x_{": "linear", "\udcff": "constant"}
    draw({name: schedule(kind) for name, kind in kinds.items()}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("peak", "total"), [(6e-4, 1), (0.0, 1), (0.0, 20), (1.0, 2)])
def test_a_single_step_and_a_rate_of_zero_can_be_drawn(tmp_path: Path, peak, total):
    result = draw({kind: schedule(kind, peak=peak, total=total) for kind in TABLES}, tmp_path / "a.png")
    assert len(schedule_text(result).splitlines()) == len(TABLES)


def test_twenty_schedules_differ_without_colour():
    assert len(set(zip(LINES * 5, MARKERS * 4, strict=True))) == 20


def test_the_command_draws_the_schedules_it_is_given_and_else_the_one_of_the_options(tmp_path: Path):
    picture = tmp_path / "a.png"
    named = command("schedule", "cosine", "linear", "cosine", "--max-steps", "40", "--output", str(picture), "--json")
    assert named.code == 0, named.err
    assert [drawn["name"] for drawn in named.json["schedules"]] == ["cosine", "linear"]
    assert [drawn["peak_step"] for drawn in named.json["schedules"]] == [2, 2]  # a twentieth is warmup
    assert named.json["picture"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    default = command("schedule", "--output", str(picture))
    assert default.out.startswith("cosine_with_min_lr  │")
    wrong = command("schedule", "linaer", "--output", str(picture))
    assert wrong.code == 2
    assert "did you mean linear?" in wrong.err
