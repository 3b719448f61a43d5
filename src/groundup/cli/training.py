"""The verbs that make a model: prepare, train, schedule."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import click

from groundup.cli.command import SOURCES, output_dir, verb
from groundup.config.load import Settings
from groundup.config.options import PREPARE_GROUPS, SCHEDULE_GROUPS, TRAIN_GROUPS
from groundup.errors import ConfigError


@verb(
    "prepare",
    "Turn text into a tokenizer and shards of tokens.\n\nA SOURCE is a file (any UTF-8 text; .jsonl, .csv and .parquet with "
    "a text column; .gz and .zst of them), a folder, - for standard input, or python-stdlib. --source gives them names and "
    "weights.",
    PREPARE_GROUPS,
    [SOURCES, output_dir()],
)
def _prepare(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.prepare import prepare_dataset, summary
    from groundup.tracking.progress import progress

    with progress() as shown:
        dataset = prepare_dataset(own["sources"], Path(own["output_dir"]), settings, shown.say)
    return summary(
        dataset
    ), f"{dataset.directory}: ready; train on it with `groundup train {shlex.quote(str(dataset.directory))} --output-dir RUN`"


@verb(
    "train",
    "Train a GPT-2 on text, or on a prepared dataset.\n\nThe same command again goes on where the run stopped, bit for bit. "
    "Ctrl-C saves first.",
    TRAIN_GROUPS,
    [SOURCES, output_dir()],
)
def _train(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']} (from the environment): this version trains in one process; start it "
            "without torchrun"
        )
    from groundup.recipes.train import train
    from groundup.tracking.progress import duration, progress

    output = Path(own["output_dir"])
    with progress() as shown:
        result = train(own["sources"], output, settings, shown)
    loss = "" if result["eval_loss"] is None else f", validation loss {result['eval_loss']:.4f}"
    run = shlex.quote(str(output))
    text = f"done: {result['steps']:,} steps in {duration(result['seconds'])}{loss}\n"
    as_it_is = " (transformers opens it as it is)" if _is_gpt2(result["final_checkpoint"]) else ""
    text += f"checkpoint: {result['final_checkpoint']}{as_it_is}\n"
    text += f"curves: {output / 'loss.png'}, {output / 'perplexity.png'}\n"
    return result, text + f'next: groundup generate {run} --prompt "…"'


def _is_gpt2(checkpoint: str) -> bool:
    return bool(json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2")


@verb(
    "schedule",
    "Draw learning-rate schedules, without training.\n\nNAMEs are those of --lr-scheduler-type, which is drawn where none is "
    "given.",
    SCHEDULE_GROUPS,
    [click.Argument(["names"], nargs=-1, metavar="NAME…")],
)
def _schedule(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.schedule import draw_named
    from groundup.tracking.schedule_picture import schedule_text

    result = draw_named(own["names"], settings)
    return result, f"{schedule_text(result)}\npicture: {result['picture']}"
