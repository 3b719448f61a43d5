"""
What each setting is worth: a small model trained with one thing changed at a time.

    python benchmarks/settings.py ../shared/data/tinyshakespeare.txt --work FOLDER [--only NAME…] [--jobs 2]

4 layers × 128, byte tokens, 500 steps of 32 × 64 tokens, two seeds; the loss is that of every validation window. Each run is a
process of its own with one thread, and its result a line of history/settings.jsonl; what is there already is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HISTORY = Path(__file__).parent / "history" / "settings.jsonl"
NANOGPT = 1.898  # its laptop setting, every window of the same text (research of 2026-11-22)
BASE = {
    "tokenizer": "byte", "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64, "total_batch_tokens": 2048,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "max_steps": 500, "learning_rate": 2e-3,
    "warmup_steps": 0.05, "eval_steps": 100, "max_eval_tokens": 0, "save_steps": 0, "sample_tokens": 0, "peak_tflops": 1,
}  # fmt: skip
SETTINGS = {
    "base": {},
    "init xavier_uniform": {"init": "xavier_uniform"},
    "init xavier_normal": {"init": "xavier_normal"},
    "init he_uniform": {"init": "he_uniform"},
    "init he_normal": {"init": "he_normal"},
    "init orthogonal": {"init": "orthogonal"},
    "init small": {"init": "small"},
    "norm rms": {"norm": "rms"},
    "norm batch": {"norm": "batch"},
    "norm none": {"norm": "none"},
    "post-norm": {"norm_position": "post"},
    "post-norm, rate 5e-4": {"norm_position": "post", "learning_rate": 5e-4},
    "post-norm, rms": {"norm": "rms", "norm_position": "post"},
    "schedule constant": {"lr_scheduler_type": "constant", "warmup_steps": None},
    "schedule constant_with_warmup": {"lr_scheduler_type": "constant_with_warmup"},
    "schedule linear": {"lr_scheduler_type": "linear"},
    "schedule cosine": {"lr_scheduler_type": "cosine"},
    "schedule inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt"},
    "schedule polynomial, power 2": {"lr_scheduler_type": "polynomial", "lr_power": 2},
    "schedule warmup_stable_decay": {"lr_scheduler_type": "warmup_stable_decay"},
    "no warmup": {"warmup_steps": 0},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 4e-3": {"learning_rate": 4e-3},
    "rate 8e-3": {"learning_rate": 8e-3},
    "sgd, rate 0.1": {"optim": "sgd", "learning_rate": 0.1},
    "sgd, rate 0.5": {"optim": "sgd", "learning_rate": 0.5},
    "adafactor": {"optim": "adafactor"},
    "adafactor, rate 8e-3": {"optim": "adafactor", "learning_rate": 8e-3},
    "muon": {"optim": "muon"},
    "muon, rate 4e-3": {"optim": "muon", "learning_rate": 4e-3},
    "muon, rate 8e-3": {"optim": "muon", "learning_rate": 8e-3},
    "decay none": {"weight_decay": 0},
    "decay coupled 0.1": {"weight_decay_type": "coupled"},
    "decay coupled 1e-4": {"weight_decay_type": "coupled", "weight_decay": 1e-4},
    "no clipping": {"max_grad_norm": 0},
    "label smoothing 0.1": {"label_smoothing_factor": 0.1},
    "teacher": {"teacher": "{teacher}"},
    "teacher, weight 0.9": {"teacher": "{teacher}", "teacher_weight": 0.9},
    "ema 0.98": {"ema_decay": 0.98},
    "batch ramp 512:2048@0.3": {"total_batch_tokens": "512:2048@0.3", "max_steps": 0, "max_train_tokens": 1_024_000},
    "length ramp 16:64@0.3": {"sequence_length": "16:64@0.3"},
    "batch 1024, 1000 steps": {"total_batch_tokens": 1024, "max_steps": 1000, "eval_steps": 200},
    "batch 512, 2000 steps": {"total_batch_tokens": 512, "max_steps": 2000, "eval_steps": 400},
    "float32": {"bf16": False},
    "fp16": {"fp16": True},
}
# The teacher is wider and has seen three times the text.
TEACHER = {"n_embd": 256, "max_steps": 1500, "eval_steps": 500}


def train(text: str, run: Path, options: dict) -> list[dict]:
    """One run, or what is there of it; its rows."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None:
            flags.append(f"--{flag}={value}")
    command = [sys.executable, "-m", "groundup", "train", text, "--output-dir", str(run), *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 5):
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measure(text: str, work: Path, name: str, seed: int) -> dict:
    """One line of the history."""
    options = BASE | SETTINGS[name] | {"seed": seed}
    if "teacher" in options:
        options["teacher"] = options["teacher"].format(teacher=work / "teacher")
    rows = train(text, work / f"{name.replace(' ', '-').replace('/', '-')}-{seed}", options)
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    steps = [row for row in rows if row.get("tokens_per_second")]
    seconds, at, seen = {0: 0.0}, 0.0, 0
    for row in steps:  # time of the steps alone
        at += (row["num_input_tokens_seen"] - seen) / row["tokens_per_second"]
        seen = row["num_input_tokens_seen"]
        seconds[row["step"]] = at
    return {
        "name": name,
        "seed": seed,
        "eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "steps": steps[-1]["step"],
        "seconds": round(at, 1),
        "eval_ema_loss": evaluations[-1].get("eval_ema_loss"),
        "curve": [[row["num_input_tokens_seen"], round(seconds[row["step"]], 2), row["eval_loss"]] for row in evaluations],
    }


def reach(curve: list, loss: float) -> tuple[float, float] | None:
    """Tokens and seconds at which a curve falls to a loss, interpolated between two evaluations."""
    for (tokens, seconds, high), (tokens2, seconds2, low) in zip(curve, curve[1:], strict=False):
        if low <= loss < high:
            part = (high - loss) / (high - low)
            return tokens + part * (tokens2 - tokens), seconds + part * (seconds2 - seconds)
    return None


def table(rows: list[dict]) -> str:
    """The history as Markdown, the best first."""
    lines = [
        f"| setting | loss, seeds | mean | tokens to {NANOGPT} | seconds to {NANOGPT} | seconds in all |",
        "|---|---|---|---|---|---|",
    ]
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    for name, found in sorted(by_name.items(), key=lambda item: statistics.mean(r["eval_loss"] or 99 for r in item[1])):
        losses = [r["eval_loss"] for r in found]
        mean = f"{statistics.mean(losses):.3f}" if None not in losses else "diverged"
        reached = [reach(r["curve"], NANOGPT) for r in found]
        tokens = f"{statistics.mean(r[0] for r in reached) / 1e3:,.0f}k" if None not in reached else "–"
        seconds = f"{statistics.mean(r[1] for r in reached):.0f}" if None not in reached else "–"
        shown = ", ".join("–" if loss is None else f"{loss:.3f}" for loss in losses)
        total = statistics.mean(r["seconds"] for r in found)
        lines.append(f"| {name} | {shown} | {mean} | {tokens} | {seconds} | {total:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    known = [json.loads(line) for line in HISTORY.read_text().splitlines()] if HISTORY.exists() else []
    there = {(row["name"], row["seed"]) for row in known}
    wanted = [(name, seed) for name in given.only for seed in given.seeds if (name, seed) not in there]
    given.work.mkdir(parents=True, exist_ok=True)
    if any("teacher" in SETTINGS[name] for name, _ in wanted):
        train(given.text, given.work / "teacher", BASE | TEACHER | {"seed": 0})
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda pair: measure(given.text, given.work, *pair), wanted):
            with HISTORY.open("a") as file:
                file.write(json.dumps(row) + "\n")
            known.append(row)
            print(f"{row['name']} seed {row['seed']}: {row['eval_loss']} in {row['seconds']} s", file=sys.stderr, flush=True)
    print(table(known))


if __name__ == "__main__":
    main()
