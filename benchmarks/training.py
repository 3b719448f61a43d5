"""Training speed, memory and MFU of GPT-2: groundup, a plain loop and Trainer, in turns; see README.md beside this."""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

from groundup.config.presets import PRESETS

if "--worker" in sys.argv:  # Linux counts the parent's memory in its children's ru_maxrss, so the parent stays small.
    import numpy as np
    import torch

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HISTORY = Path(__file__).parent / "history" / "training.jsonl"
FULL = {"model": "gpt2", "micro_batch": 2, "accumulation": 1, "warmup": 2, "steps": 5, "rounds": 5}
QUICK = {"model": "gpt2-micro", "micro_batch": 8, "accumulation": 2, "warmup": 3, "steps": 12, "rounds": 2}
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions")
# What all contenders share besides the shape; the rate is constant.
SAME = {"learning_rate": 6e-4, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0}


def train_groundup(s, folder, step_done):
    """What `groundup train` runs between two evaluations, set up as it sets it up."""
    import groundup

    options = common_options(s) | {name: s[name] for name in SHAPE} | {"tokenizer": str(folder / "data"), "device": DEVICE}
    with groundup.open_training(folder / "data", tempfile.mkdtemp(dir=folder), **options) as training:
        losses = []
        for step in training:
            step_done()
            losses.append(step.loss)
        return training.model, losses[0]


def train_plain(s, folder, step_done):
    """A plain loop over transformers' model, as a careful person writes it."""
    # The same function as the default gelu_new, which transformers computes in eight element-wise passes.
    model = huggingface_model(s, activation_function="gelu_pytorch_tanh").to(DEVICE).train()
    forward = torch.compile(model) if s["compile"] else model
    decaying, others = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decaying, "weight_decay": SAME["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, SAME["learning_rate"], (SAME["adam_beta1"], SAME["adam_beta2"]), fused=True)
    batches = iter(windows(s, folder).to(DEVICE).split(s["micro_batch"]))
    losses = []
    for _ in range(s["warmup"] + s["steps"]):
        for _ in range(s["accumulation"]):
            batch = next(batches)
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=s["dtype"] == "bf16"):
                loss = forward(input_ids=batch, labels=batch).loss / s["accumulation"]
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), SAME["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step_done()
    return model, sum(losses[: s["accumulation"]]).item()


def train_trainer(s, folder, step_done):
    """Hugging Face's Trainer, with everything that is not training switched off."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            step_done()

    model = huggingface_model(s)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=folder), optim="adamw_torch_fused", report_to="none", disable_tqdm=True,
        save_strategy="no", eval_strategy="no", logging_strategy="no", logging_first_step=True,
        use_cpu=DEVICE == "cpu", dataloader_pin_memory=DEVICE == "cuda", **common_options(s),
    )  # fmt: skip
    dataset = [{"input_ids": window, "labels": window} for window in windows(s, folder)]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Watch()])
    trainer.train()
    return model, trainer.state.log_history[0]["loss"]


def common_options(s):
    """What groundup and Trainer call by the same names."""
    batch = {"per_device_train_batch_size": s["micro_batch"], "gradient_accumulation_steps": s["accumulation"]}
    run = {"max_steps": s["warmup"] + s["steps"], "bf16": s["dtype"] == "bf16", "torch_compile": s["compile"]}
    return SAME | batch | run | {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}


CONTENDERS = {"groundup": train_groundup, "plain loop": train_plain, "Trainer": train_trainer}


def huggingface_model(s, **changes):
    """GPT-2 of this shape in transformers: no dropout, as in groundup, and no generation cache, which would only cost."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {name: s[name] for name in (*SHAPE, "vocab_size")}
    return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False, **changes))


def windows(s, folder):
    """The training tokens as (windows, T) int64."""
    tokens = torch.from_numpy(np.fromfile(folder / "data" / "train.bin", dtype=np.uint16).astype(np.int64))
    return tokens[: len(tokens) - 1].view(-1, s["n_positions"])


def prepare(s, folder):
    """Random tokens in nanoGPT's format and a tokenizer with so many ids; returns facts about model and machine."""
    from groundup.model.flops import training_flops_per_token
    from groundup.model.gpt2 import GPT2Config
    from groundup.tokenizer.tokenizer import byte_to_character, from_merges

    # The first pairs of bytes as merges: groundup wants a tokenizer, but only the number of its ids matters here.
    letters = byte_to_character()
    merges = [(a, b) for a in letters for b in letters][: s["vocab_size"] - 257]
    words = [*letters, *(a + b for a, b in merges)]
    (folder / "data").mkdir()
    from_merges({word: index for index, word in enumerate(words)}, merges).save(folder / "data")
    count = (s["warmup"] + s["steps"]) * s["tokens_per_step"] + 1  # so that no contender begins a second epoch
    tokens = np.random.default_rng(0).integers(0, s["vocab_size"], count).astype(np.uint16)
    for name in ("train", "val"):  # groundup wants both
        tokens.tofile(folder / "data" / f"{name}.bin")
    flops = training_flops_per_token(GPT2Config(**{name: s[name] for name in (*SHAPE, "vocab_size")}))
    return {"flops_per_token": flops, "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None}


def compete(name, s, folder):
    """One round of one contender, timed from the end of its last warmup step to the end of its last step."""
    from groundup.runtime.device import choose_machine, peak_flops

    ends, last_warmup, last = [], s["warmup"] - 1, s["warmup"] + s["steps"] - 1

    def step_done():
        # The device is waited for at these two steps alone: a loop that runs ahead of it may.
        if len(ends) in (last_warmup, last) and DEVICE == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    model, first_loss = CONTENDERS[name](s, folder, step_done)
    speed = s["tokens_per_step"] * s["steps"] / (ends[last] - ends[last_warmup])
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else rss
    work = {"parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads(), "steps": len(ends)}
    # Last, so that it disturbs nothing: the speed of the machine, several times, because the first are slow.
    peak = max(peak_flops(choose_machine(DEVICE, s["dtype"] == "bf16")) for _ in range(5))
    return {"tokens_per_second": speed, "peak_bytes": memory, "first_loss": first_loss, "work": work, "peak": peak}


def in_worker(task, s, folder):
    """Run a task in a fresh process, so that its peak memory is its own; on one GPU at most, for Trainer would take all."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", task, json.dumps(s), folder]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def require_equal_work(rounds, s):
    """Same parameters, threads and steps, and a first loss that fits random weights and random tokens."""
    work = {name: rounds[0][name]["work"] for name in CONTENDERS}
    if any(found["work"] != work["groundup"] for r in rounds for found in r.values()):
        sys.exit(f"the contenders do different work: {work}")
    expected, losses = math.log(s["vocab_size"]), {name: round(rounds[0][name]["first_loss"], 3) for name in CONTENDERS}
    print(f"equal work: {work['groundup']}; first losses {losses}; ln V {expected:.3f}")
    # Initial logits have a variance of about n_embd · 0.02², half of which adds to ln V: 0.15 for GPT-2.
    if any(abs(loss - expected) > 0.5 for loss in losses.values()):
        sys.exit("a first loss is not that of an untrained model")


def summarize(rounds, facts):
    """Per contender: all rounds, their median, and the median of its ratios to groundup, round by round."""
    result = {}
    for name in CONTENDERS:
        speeds = [r[name]["tokens_per_second"] for r in rounds]
        ratios = [r[name]["tokens_per_second"] / r["groundup"]["tokens_per_second"] for r in rounds]
        median, memory = statistics.median(speeds), int(statistics.median(r[name]["peak_bytes"] for r in rounds))
        result[name] = {"tokens_per_second": [round(speed, 1) for speed in speeds], "median": round(median, 1)}
        result[name] |= {"ratio_to_groundup": round(statistics.median(ratios), 3), "peak_bytes": memory}
        result[name] |= {"mfu": round(median * facts["flops_per_token"] / facts["peak_flops"], 4)}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"defaults {QUICK} instead of {FULL}")
    parser.add_argument("--model", choices=PRESETS)
    for name in ("micro-batch", "accumulation", "warmup", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile for every contender")
    parser.add_argument("--no-record", action="store_true", help="append nothing to history/training.jsonl")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    s = (QUICK if given["quick"] else FULL) | given
    if min(s[name] for name in FULL if name != "model") < 1:
        parser.error("micro-batch, accumulation, warmup, steps and rounds are at least 1")
    record = not s.pop("no_record")
    s |= {name: PRESETS[s["model"]][name] for name in SHAPE}
    s["tokens_per_step"] = s["micro_batch"] * s["accumulation"] * s["n_positions"]
    s["vocab_size"] = 50257 if s["n_positions"] == 1024 else 8192  # GPT-2's for its shapes, groundup's for small ones
    print(", ".join(f"{name} {value}" for name, value in s.items()), flush=True)
    load, rounds = round(os.getloadavg()[0], 2), []
    with tempfile.TemporaryDirectory() as temporary:
        facts = in_worker("prepare", s, temporary)
        for number in range(s["rounds"]):
            rounds.append({task: in_worker(task, s, temporary) for task in CONTENDERS})
            speeds = ", ".join(f"{name} {found['tokens_per_second']:,.0f}" for name, found in rounds[-1].items())
            print(f"round {number + 1}: {speeds} tokens/s", flush=True)
    require_equal_work(rounds, s)
    # One peak for all, the best that any process saw: other work on the machine only ever lowers it.
    facts["peak_flops"], facts["peak_origin"] = max(r[name]["peak"] for r in rounds for name in CONTENDERS)
    print(f"peak {facts['peak_flops'] / 1e12:.2f} TFLOP/s ({facts['peak_origin']}); load before {load}\n")
    contenders = summarize(rounds, facts)
    print(f"{'':12}{'tokens/s':>10}{'min – max':>18}{'÷ groundup':>12}{'peak memory':>13}{'MFU':>8}")
    for name, c in contenders.items():
        speeds = f"{min(c['tokens_per_second']):,.0f} – {max(c['tokens_per_second']):,.0f}"
        print(f"{name:12}{c['median']:10,.0f}{speeds:>18}{c['ratio_to_groundup']:12.2f}", end="")
        print(f"{c['peak_bytes'] / 2**30:9.2f} GiB{c['mfu']:8.1%}")
    if record:
        HISTORY.parent.mkdir(exist_ok=True)
        line = (
            provenance(Path(__file__).name)
            | {"work": rounds[0]["groundup"]["work"], "load_before": load, "configuration": s}
            | facts
        )
        with HISTORY.open("a", encoding="utf-8") as file:
            print(json.dumps(line | {"contenders": contenders}, ensure_ascii=False), file=file)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        task, s, folder = sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
        print(json.dumps(prepare(s, folder) if task == "prepare" else compete(task, s, folder)))
    else:
        main()
