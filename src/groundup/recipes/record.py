"""What a run's directory says of it: its configuration, what must not change, and the data that it left out."""

import json
import os
import platform
import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import tomli_w
import torch

from groundup import __version__
from groundup.checkpoint.commit import checkpoints
from groundup.config.load import Settings
from groundup.config.options import (
    PREPARE_GROUPS,
    BatchOptions,
    CodeOptions,
    InitialWeightsOptions,
    OptimizerOptions,
    RunOptions,
    TokenizerOptions,
)
from groundup.config.plan import Plan
from groundup.data.mixture import Corpus
from groundup.data.order import ORDER_VERSION
from groundup.data.sources import RUN_HEADER, is_run
from groundup.errors import CheckpointError, ConfigError, ResourceError
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.runtime.files import existing_parent, replace_durably
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.tracking.metrics import METRICS, append_row
from groundup.training.state import TrainState

Say = Callable[[str], None]
CONFIG, SAMPLES, LOCK, LEFT_OUT = "config.toml", "samples.jsonl", ".lock", "left_out.jsonl"
STARTS = "starts.jsonl"
PICTURES = ("loss.png", "perplexity.png")
TRAINER_STATE = "trainer_state.json"


def identity_of(
    config: GPT2Config, corpus: Corpus, tokenizer: Tokenizer, settings: Settings, plan: Plan, teacher: str | None
) -> dict[str, Any]:
    """What must not change between the parts of one run; an option that is off says nothing, as before there was one."""
    batch, optimizer, code = settings[BatchOptions], settings[OptimizerOptions], settings[CodeOptions]
    initial = settings[InitialWeightsOptions]
    # A pass draws one dropout mask, and has one batch norm, for all its windows.
    by_pass = max(config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) > 0 or config.norm == "batch"
    optional = {
        "init": initial.init if initial.init != "gpt2" else None,
        "init_from": initial.init_from or None,
        "freeze": list(initial.freeze) or None,
        "per_device_train_batch_size": plan.per_pass if by_pass else None,
        "sources": corpus.weights or None,
        "optim": optimizer.optim if optimizer.optim != "adamw_torch_fused" else None,
        "weight_decay_type": optimizer.weight_decay_type if optimizer.weight_decay_type != "decoupled" else None,
        # Its weights, wherever they are: a run that trained on is another teacher.
        "teacher": teacher,
        "ema": True if optimizer.ema_decay else None,
        "sequence_length": batch.sequence_length or None,
        "total_batch_ramp": str(batch.total_batch_tokens) if isinstance(batch.total_batch_tokens, str) else None,
        "fim_rate": code.fim_rate or None,
        "fim_spm_rate": code.fim_spm_rate if code.fim_rate else None,
    }
    return {
        **asdict(config),
        **{name: value for name, value in optional.items() if value is not None},
        "tokenizer_sha256": tokenizer.sha256,
        "dataset_sha256": corpus.identity,
        "seed": settings[RunOptions].seed,
        "total_batch_tokens": plan.tokens_per_step,
        "stride": batch.stride or config.n_positions,
        "order_version": ORDER_VERSION,
    }


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """
    The trainer_state.json of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = checkpoint / TRAINER_STATE
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        TrainState(**saved["state"])
        dict(saved["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); use another checkpoint") from None
    return saved


def require_identity(checkpoint: Path, was: dict[str, Any], identity: dict[str, Any]) -> None:
    """
    Refuse to go on with what another run began.

    Raises:
        ConfigError: names what differs, and both values.
    """
    # Options that are younger than the checkpoint had their default.
    was = {f.name: f.default for f in fields(GPT2Config)} | was
    keys = sorted(was.keys() | identity.keys())
    changed = [k for k in keys if was.get(k) != identity.get(k)]
    if "sources" in changed and "dataset_sha256" in changed:
        changed.remove("dataset_sha256")  # it follows from them
    if differences := [f"{k}: {was.get(k, 'default')} → {identity.get(k, 'default')}" for k in changed]:
        raise ConfigError(
            f"run {checkpoint.parent}: cannot resume {checkpoint.name} with changed {'; '.join(differences)}; give the "
            f"values it was started with (they are in {checkpoint.parent / CONFIG}, which --config reads), or another "
            "--output-dir for a new run"
        )


def say_changes(run: Path, settings: Settings, say: Say) -> None:
    """Options that may change on resume, and did, are said."""
    try:
        before = tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    was = {key: value for table in before.values() if isinstance(table, dict) for key, value in table.items()}
    now = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.flat().items()}
    for key in sorted(was.keys() & now.keys()):
        if was[key] != now[key]:
            say(f"changed since this run was started: {key} {was[key]} → {now[key]}")


def write_config(run: Path, sources: Sequence[str], settings: Settings, *, prepared_here: bool) -> None:
    """Write every option that took effect; those of preparing did only where the run prepared its data."""
    document: dict[str, Any] = {"sources": list(sources)}
    # With somebody's weights comes their tokenizer: the options about one had no effect.
    unused: tuple[type, ...] = (TokenizerOptions,) if settings[InitialWeightsOptions].init_from else ()
    unused = unused if prepared_here else PREPARE_GROUPS
    for group, options in settings.groups.items():
        name = group.__name__.removesuffix("Options").lower()
        document[name] = {
            key: value
            for key, value in asdict(options).items()
            if value is not None and (group not in unused or settings.origins[key] != "default")
        }
    head = f"{RUN_HEADER} {__version__}); another like it, from the same folder:\n"
    head += f"# groundup train --config {run / CONFIG} --output-dir ANOTHER\n\n"
    replace_durably(run / CONFIG, (head + tomli_w.dumps(document)).encode(errors="backslashreplace"))


def add_start(run: Path, step: int, machine: str) -> None:
    """
    Record that training begins here, or goes on: when, after which step, on what, with which versions.

    Args:
        machine: in words.
    """
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads"
    versions = {"groundup": __version__, "torch": torch.__version__, "python": platform.python_version()}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    append_row(run / STARTS, {"step": step, "time": now, "machine": f"{machine}; {system}", "versions": versions})


def read_left_out(run: Path) -> list[dict[str, Any]]:
    """
    The batches that a run went back before, to leave them out: step, first_sample, samples, loss, grad_norm of each.

    Raises:
        CheckpointError: the file cannot be read; without it the run would learn other data.
    """
    path = run / LEFT_OUT
    if not path.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        ranges = [(row["first_sample"], row["samples"]) for row in rows]
        if not ranges or not all(type(first) is type(count) is int and first >= 0 < count for first, count in ranges):
            raise ValueError("no positions of batches")
        return rows
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"run {run}: {path.name}, which says what data was left out, is damaged ({error}); restore it from a copy"
        ) from None


def own_left_out(run: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Of these batches those that this very run left out: one that starts anew with other data or another seed has none."""
    digest = _digest(identity)
    return [row for row in read_left_out(run) if row.get("identity", digest) == digest]


def add_left_out(run: Path, identity: dict[str, Any], row: dict[str, Any]) -> None:
    """Record one more batch that the run leaves out, durably: what follows depends on it."""
    rows = [*read_left_out(run), {**row, "identity": _digest(identity)}]
    replace_durably(run / LEFT_OUT, "".join(json.dumps(item) + "\n" for item in rows).encode())


def _digest(identity: dict[str, Any]) -> str:
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def require_ours(run: Path) -> None:
    """
    A run's files are rewritten as it goes on: refuse a folder where files of these names are somebody else's.

    Raises:
        ConfigError: names the file.
    """
    ours = is_run(run)
    for name in (CONFIG, METRICS, SAMPLES, STARTS, LEFT_OUT, *PICTURES, *(path.name for path in checkpoints(run))):
        if not ours and (run / name).exists():
            raise ConfigError(
                f"output_dir: {run} holds a {name} that no run of groundup wrote, and a run would replace it; choose another "
                "--output-dir"
            )


def require_disk_space(run: Path, model: GPT2, copies: int) -> None:
    """
    Refuse to start where not one checkpoint fits.

    Args:
        copies: float32 numbers that a checkpoint holds of each parameter.

    Raises:
        ResourceError: with both figures.
    """
    needed = copies * 4 * parameter_count(model)
    free = shutil.disk_usage(existing_parent(run)).free
    if free < needed:
        raise ResourceError(
            f"output_dir: {run} has {free / 2**20:,.0f} MiB free, one checkpoint takes {needed / 2**20:,.0f} MiB; free some "
            "space or choose another --output-dir"
        )
