"""groundup schedule: draw learning rates without training."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from groundup.config.load import Settings
from groundup.config.options import DrawingOptions, ScheduleOptions
from groundup.config.plan import steps_of
from groundup.errors import ConfigError
from groundup.optim.schedule import Schedule
from groundup.runtime.files import explained_os_errors, make_directory
from groundup.tracking.schedule_picture import draw_schedules

POINTS = 500
"""Of a curve; enough for a picture, and little enough for JSON."""


def draw(schedules: Mapping[str, Schedule], picture: Path | None = None) -> dict[str, Any]:
    """
    Draw schedules over one another.

    Args:
        schedules: by the name that the picture gives each; at least one.
        picture: the PNG to write; none by default.

    Returns:
        What ``schedule --json`` prints: schedules (name, lr_scheduler_type, first, peak, peak_step, last, points as
        [step, learning rate]), steps, picture.

    Raises:
        ConfigError: the place of the picture cannot be written.
    """
    curves = {name: schedule_points(schedule) for name, schedule in schedules.items()}
    if picture is not None:
        with explained_os_errors(picture, "schedule"):
            make_directory(picture.parent, "--output")
            draw_schedules(curves, picture)
    return {
        "schedules": [_drawn(name, schedule.kind, curves[name]) for name, schedule in schedules.items()],
        "steps": max(schedule.total_steps for schedule in schedules.values()),
        "picture": None if picture is None else str(picture),
    }


def schedule_points(schedule: Schedule, points: int = POINTS) -> list[tuple[int, float]]:
    """
    A schedule as (step, learning rate), steps counted from 1.

    Evenly spread, about ``points`` of them, or every step where there are no more; the first, the last and those around
    which a schedule bends are among them.
    """
    total = schedule.total_steps
    spread = {1 + round(i * (total - 1) / (points - 1)) for i in range(points)} if total > points else set(range(1, total + 1))
    bends = (schedule.warmup_steps, schedule.warmup_steps + 1, total - schedule.decay_steps, total - schedule.decay_steps + 1)
    steps = sorted(spread | {step for step in bends if 1 <= step <= total})
    return [(step, schedule.learning_rate_at(step)) for step in steps]


def _drawn(name: str, kind: str, points: list[tuple[int, float]]) -> dict[str, Any]:
    peak_step, peak = max(points, key=lambda point: (point[1], -point[0]))
    return {
        "name": name,
        "lr_scheduler_type": kind,
        "first": points[0][1],
        "peak": peak,
        "peak_step": peak_step,
        "last": points[-1][1],
        "points": [list(point) for point in points],
    }


def schedule_of(options: ScheduleOptions, warmup_steps: int, decay_steps: int, total_steps: int, kind: str = "") -> Schedule:
    """
    The schedule that options ask for.

    Args:
        warmup_steps: counted, where the option may be a fraction; so are ``decay_steps``.
        kind: this one instead of ``lr_scheduler_type``.
    """
    return Schedule(
        kind or options.lr_scheduler_type,
        options.learning_rate,
        warmup_steps,
        total_steps,
        min_rate=options.min_lr_rate,
        power=options.lr_power,
        decay_steps=decay_steps,
        decay_type=options.lr_decay_type,
        scale=options.inverse_sqrt_scale,
    )


def draw_named(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """
    Draw the schedules of these names, or else the one that ``lr_scheduler_type`` names: ``groundup schedule``.

    Raises:
        ConfigError: there is no schedule of a name.
    """
    options, drawing = settings[ScheduleOptions], settings[DrawingOptions]
    if not drawing.output.endswith(".png"):
        raise ConfigError(f"output: {drawing.output} (from {settings.origins['output']}) is no .png; name a file that ends so")
    known = next(f for f in fields(ScheduleOptions) if f.name == "lr_scheduler_type").metadata["choices"]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"schedule: {name!r} is not one of {', '.join(known)}{hint}")
    total = drawing.max_steps
    warmup, decay = steps_of(options.warmup_steps, total), steps_of(options.num_decay_steps, total)
    chosen = list(dict.fromkeys(names)) or [options.lr_scheduler_type]
    return draw({kind: schedule_of(options, warmup, decay, total, kind) for kind in chosen}, Path(drawing.output))
