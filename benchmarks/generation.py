"""Speed of greedy generation with GPT-2: groundup, transformers' generate and a loop without cache, in turns."""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from provenance import provenance

from groundup.config.presets import PRESETS
from groundup.generation.generate import generate_tokens
from groundup.generation.inference import for_inference
from groundup.generation.sampling import Sampler
from groundup.interop.huggingface import config_to_hugging_face, to_hugging_face
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize

HISTORY = Path(__file__).parent / "history" / "generation.jsonl"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
NEVER = -1
"""An end-of-text id that no contender ever chooses."""
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions")


def new_model(preset):
    """Random weights, far enough from zero that the greedy choice is not a tie."""
    model = GPT2(GPT2Config(**{name: PRESETS[preset][name] for name in SHAPE}))
    draw = torch.Generator().manual_seed(0)
    initialize(model, draw)
    return model.eval()


def groundup_contender(weights, dtype):
    """What `groundup generate --temperature 0` runs."""
    model = GPT2(weights.config)
    model.load_state_dict(weights.state_dict())
    model = for_inference(model, DEVICE, dtype)

    def run(prompts, new_tokens):
        rows = [[] for _ in prompts]
        for choice in generate_tokens(
            model, prompts.tolist(), Sampler(temperature=0), seeds=[0] * len(prompts), max_new_tokens=new_tokens,
            end_of_text_id=NEVER, batch_size=len(prompts),
        ):  # fmt: skip
            rows[choice.prompt].append(choice.token)
        return rows

    return run


def transformers_contender(weights, dtype):
    """transformers' generate at its best here: SDPA, a cache, inference mode, and the fused spelling of the same GELU."""
    model = huggingface_model(weights, dtype)

    @torch.inference_mode()
    def run(prompts, new_tokens):
        ids = model.generate(
            prompts.to(DEVICE), attention_mask=torch.ones_like(prompts).to(DEVICE), do_sample=False, use_cache=True,
            max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return ids[:, prompts.size(1) :].tolist()

    return run


def cacheless_contender(weights, dtype):
    """The loop that everybody writes first: the whole text again for every token."""
    model = huggingface_model(weights, dtype)

    @torch.inference_mode()
    def run(prompts, new_tokens):
        ids = prompts.to(DEVICE)
        for _ in range(new_tokens):
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids[:, prompts.size(1) :].tolist()

    return run


CONTENDERS = {"groundup": groundup_contender, "transformers": transformers_contender, "no cache": cacheless_contender}


def huggingface_model(weights, dtype):
    import transformers

    transformers.logging.set_verbosity_error()
    config = config_to_hugging_face(weights.config, weights.config.vocab_size - 1) | {
        "activation_function": "gelu_pytorch_tanh"
    }
    del config["architectures"], config["model_type"], config["dtype"]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    model.load_state_dict(to_hugging_face(weights.state_dict()), strict=False)  # the head is tied
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.to(DEVICE, dtype).eval()


def read_bandwidth():
    """Bytes per second that matrix-vector products read from memory at best, over 512 MiB in float32."""
    matrix, vector = torch.ones(2**15, 2**12, device=DEVICE), torch.ones(2**12, device=DEVICE)
    seconds = []
    for _ in range(12):
        started = now()
        torch.mv(matrix, vector)
        seconds.append(now() - started)
    return matrix.nbytes / min(seconds)


def now():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compete(contenders, prompts, new_tokens, rounds):
    """Tokens per second of each contender, round by round, in turns; the first turn of each warms up."""
    texts = {name: run(prompts, min(8, new_tokens)) for name, run in contenders.items()}
    same = {name: sum(a == b for a, b in zip(text, texts["groundup"], strict=True)) for name, text in texts.items()}
    speeds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            # Without a cache a token costs what the whole text costs: fewer tokens tell as much.
            count = max(4, new_tokens // 10) if name == "no cache" else new_tokens
            started = now()
            rows = run(prompts, count)
            speeds[name].append(sum(map(len, rows)) / (now() - started))
    return speeds, same


def summarize(speeds, bytes_per_step, batch, bandwidth):
    result = {}
    for name, found in speeds.items():
        ratios = [speed / ours for speed, ours in zip(found, speeds["groundup"], strict=True)]
        median = statistics.median(found)
        result[name] = {
            "tokens_per_second": [round(speed, 2) for speed in found],
            "median": round(median, 2),
            "ratio_to_groundup": round(statistics.median(ratios), 3),
        }
        if name != "no cache":
            result[name]["bandwidth_share"] = round(median / batch * bytes_per_step / bandwidth, 3)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=PRESETS, default="gpt2")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="gpt2-mini, 50 tokens, 2 rounds")
    parser.add_argument("--no-record", action="store_true", help="append nothing to history/generation.jsonl")
    options = parser.parse_args()
    if options.quick:
        options.model, options.new_tokens, options.rounds = "gpt2-mini", 50, 2
    load = round(os.getloadavg()[0], 2)
    weights = new_model(options.model)
    bandwidth = read_bandwidth()
    print(f"{options.model}, {parameter_count(weights):,} parameters, prompt {options.prompt_tokens}, {options.new_tokens} new")
    print(f"tokens, {options.rounds} rounds; read bandwidth {bandwidth / 1e9:.1f} GB/s; load before {load}")
    results = []
    for name in options.dtype:
        contenders = {contender: make(weights, DTYPES[name]) for contender, make in CONTENDERS.items()}
        # Position embeddings are looked up, a row a token; everything else is read for every step.
        bytes_per_step = sum(p.nbytes for p in weights.parameters() if p is not weights.wpe.weight)
        bytes_per_step = bytes_per_step * DTYPES[name].itemsize // 4
        for batch in options.batch:
            draw = torch.Generator().manual_seed(1)
            prompts = torch.randint(weights.config.vocab_size, (batch, options.prompt_tokens), generator=draw)
            speeds, same = compete(contenders, prompts, options.new_tokens, options.rounds)
            result = summarize(speeds, bytes_per_step, batch, bandwidth)
            results.append({"dtype": name, "batch": batch, "rows_that_begin_alike": same, "contenders": result})
            print(f"\n{name}, batch {batch} (texts that begin as groundup's: {same})")
            print(f"{'':14}{'tokens/s':>10}{'min – max':>18}{'÷ groundup':>12}{'bandwidth':>11}")
            for contender, c in result.items():
                spread = f"{min(c['tokens_per_second']):,.1f} – {max(c['tokens_per_second']):,.1f}"
                share = f"{c['bandwidth_share']:11.0%}" if "bandwidth_share" in c else ""
                print(f"{contender:14}{c['median']:10,.1f}{spread:>18}{c['ratio_to_groundup']:12.2f}{share}", flush=True)
    if not options.no_record:
        HISTORY.parent.mkdir(exist_ok=True)
        here = {"gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None, "threads": torch.get_num_threads()}
        facts = {"load_before": load, "configuration": vars(options), "read_bandwidth": round(bandwidth)}
        with HISTORY.open("a", encoding="utf-8") as file:
            print(
                json.dumps(provenance(Path(__file__).name) | here | facts | {"results": results}, ensure_ascii=False), file=file
            )


if __name__ == "__main__":
    main()
