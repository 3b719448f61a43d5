"""
Does fill-in-the-middle help to fill a line? The same model trained with and without it, on Python's standard library.

    python benchmarks/fill.py --work FOLDER [--steps 2500] [--lines 1000] [--jobs 2]

In files that neither has seen, one line is taken out. The model trained with fill-in-the-middle sees what is before and after
it, the other one what is before. The hole begins before the line break, because a break and the indentation after it are one
token. Both write greedily; what counts is the first line that they write, and the loss of the line that was there. The
result is appended to history/fill.jsonl. Finished trainings in FOLDER are measured again, not trained.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from provenance import provenance
from torch.nn import functional as F

import groundup
from groundup.data.shards import open_dataset
from groundup.generation.generate import generate_tokens
from groundup.generation.sampling import Sampler
from groundup.recipes.loading import Loaded
from groundup.tokenizer.special import fim_ids, usable_ids

Hole = tuple[str, str, str]
"""What is before, the line, what is after."""

HISTORY = Path(__file__).parent / "history" / "fill.jsonl"
MODEL = {
    "n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 2048, "total_batch_tokens": 4096,
    "optim": "muon", "learning_rate": 3e-3, "eval_steps": 500, "save_steps": 500,
    "max_eval_tokens": 65536, "sample_tokens": 0, "peak_tflops": 1,
}  # fmt: skip
RATES = {"left to right": 0.0, "fill-in-the-middle": 0.9}
SPM_RATE = 1.0
LONGEST_LINE = 32
"""Tokens that a model may write."""
CONTEXT = MODEL["n_positions"]


def train(run: Path, rate: float, steps: int, threads: str) -> None:
    given = MODEL | {"max_steps": steps, "fim_rate": rate, "fim_spm_rate": SPM_RATE}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "groundup", "train", "python-stdlib", "--output-dir", str(run), *flags]
    with run.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, stderr=log, stdout=log, env=os.environ | {"OMP_NUM_THREADS": threads})


def holes(run: Path, count: int) -> list[Hole]:
    """(before, line, after) from files of the validation split, at most 20 lines a file, at least 3 letters in each."""
    dataset = open_dataset(run / "dataset")
    stream, tokenizer, draw = dataset.stream("validation"), dataset.tokenizer, random.Random(0)
    tokens = stream.read(0, len(stream)).astype(np.int64)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    found = []
    for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
        lines = tokenizer.decode(tokens[start:end].tolist()).split("\n")
        numbers = [n for n in range(5, len(lines) - 5) if sum(c.isalpha() for c in lines[n]) >= 3]
        chosen = draw.sample(numbers, min(20, len(numbers)))
        found += [("\n".join(lines[:n]), lines[n], "\n" + "\n".join(lines[n + 1 :])) for n in chosen]
    draw.shuffle(found)
    return found[:count]


def prompts_of(loaded: Loaded, asked: list[Hole], order: str) -> list[list[int]]:
    """
    What the model is shown.

    Args:
        order: SPM, as `groundup generate` asks, or PSM; anything else is what is before the hole alone.
    """
    tokenizer, marks = loaded.tokenizer, fim_ids(loaded.tokenizer)
    prompts = []
    room = CONTEXT - LONGEST_LINE - 4
    for before, _, after in asked:
        prefix = tokenizer.encode(before[-4000:]).tolist()
        suffix = tokenizer.encode(after[:4000]).tolist()[: room // 3]
        if order == "PSM":
            prompts.append([marks.prefix, *prefix[len(suffix) - room :], marks.suffix, *suffix, marks.middle])
        elif order == "SPM":
            prompts.append([marks.prefix, marks.suffix, *suffix, marks.middle, *prefix[len(suffix) - room :]])
        else:
            prompts.append(prefix[-room:])
    return prompts


def exact_matches(loaded: Loaded, asked: list[Hole], prompts: list[list[int]]) -> float:
    """Share of holes where the first line that is written, greedily, is the one that was there."""
    tokenizer = loaded.tokenizer
    written: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    drawn = generate_tokens(
        loaded.model, prompts, Sampler(temperature=0), seeds=[0] * len(prompts), max_new_tokens=LONGEST_LINE,
        end_of_text_id=tokenizer.end_of_text_id, usable_ids=usable_ids(tokenizer), batch_size=16,
    )  # fmt: skip
    for choice in drawn:
        if choice.token != tokenizer.end_of_text_id:
            written[choice.prompt].append(choice.token)
    texts = [tokenizer.decode(written[number]) for number in range(len(prompts))]
    lines = ["\n" + line for _, line, _ in asked]
    return sum((text + "\n").startswith(line + "\n") for text, line in zip(texts, lines, strict=True)) / len(asked)


def line_loss(loaded: Loaded, asked: list[Hole], prompts: list[list[int]]) -> float:
    """Nats per token of the lines that were there."""
    total = tokens = 0
    for prompt, (_, line, _) in zip(prompts, asked, strict=True):
        answer = loaded.tokenizer.encode("\n" + line).tolist()[:LONGEST_LINE]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            scores = loaded.model.logits(loaded.model(ids[:, :-1]))[0, -len(answer) :].float()
        total += F.cross_entropy(scores, ids[0, -len(answer) :], reduction="sum").item()
        tokens += len(answer)
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    runs = {name: given.work / name.replace(" ", "-") for name in RATES}
    threads = str(max(1, (os.cpu_count() or 1) // given.jobs))
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda name: train(runs[name], RATES[name], given.steps, threads), RATES))
    asked = holes(runs["left to right"], given.lines)
    facts = {"model": MODEL, "steps": given.steps, "rates": RATES, "spm_rate": SPM_RATE, "lines": len(asked)}
    line = provenance("fill.py") | facts
    for name, run in runs.items():
        line[name], loaded = {}, groundup.load(run)
        for order in ("from the left", "SPM") if RATES[name] else ("from the left",):
            prompts = prompts_of(loaded, asked, order)
            line[name][order] = {
                "exact_match": round(exact_matches(loaded, asked, prompts), 4),
                "line_loss": round(line_loss(loaded, asked, prompts), 4),
            }
        rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        line[name]["eval_loss"] = [row["eval_loss"] for row in rows if row.get("eval_loss")][-1]
        print(name, line[name], flush=True)
    with HISTORY.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
