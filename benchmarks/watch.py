"""
What watching costs a run: tokens per second with `groundup watch` and a page that asks, against without, in turns.

    python benchmarks/watch.py [--pairs 6] [--seconds 30] [--threads 2]

One training goes on all the time. In every second stretch a server watches it, and is asked for data.json every three seconds,
as its page does; the training writes so often that the answer is another one each time. Beside the speed, the processor time
that the server used is measured, which a busy machine disturbs less. The result is appended to history/watch.jsonl.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from provenance import provenance

HISTORY = Path(__file__).parent / "history" / "watch.jsonl"
MODEL = {
    "tokenizer": "byte", "n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "total_batch_tokens": 4096,
    "per_device_train_batch_size": 16, "max_steps": 1_000_000, "eval_steps": 0, "save_steps": 0, "logging_steps": 2,
    "sample_tokens": 0, "peak_tflops": 1, "device": "cpu",
}  # fmt: skip
POLL_SECONDS = 3.0
SETTLING_SECONDS = 5.0
"""At the start of each stretch: the server starts then."""
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def process(*words, threads):
    """A command of groundup's, ended at the end."""
    started = subprocess.Popen(
        [sys.executable, "-m", "groundup", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    try:
        yield started
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()


def place(run):
    """When the metrics were last written to, and how many tokens had been seen."""
    path = run / "metrics.jsonl"
    while True:
        before = path.stat().st_mtime
        tokens = json.loads(path.read_text().splitlines()[-1])["num_input_tokens_seen"]
        if path.stat().st_mtime == before:
            return before, tokens


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def stretch(run, seconds, watched, threads):
    """Tokens per second of one stretch; with a server also its share of one core, and the size of an answer."""
    if not watched:
        time.sleep(SETTLING_SECONDS)
        first, begun = place(run), time.monotonic()
        time.sleep(seconds)
        return {"tokens_per_second": speed(first, place(run)), "seconds": time.monotonic() - begun}
    with process("watch", str(run), "--port", "0", threads=threads) as server:
        address = re.search(r"http://\S+", server.stderr.readline())[0]
        version, answers, size = "", 0, 0

        def ask():
            nonlocal version, answers, size
            request = urllib.request.Request(address + "/data.json", headers={"If-None-Match": version} if version else {})
            try:
                with urllib.request.urlopen(request) as answer:
                    body = answer.read()
                    version, answers, size = answer.headers["ETag"], answers + 1, len(body)
            except urllib.error.HTTPError as error:
                if error.code != 304:
                    raise

        end = time.monotonic() + SETTLING_SECONDS
        while time.monotonic() < end:
            ask()
            time.sleep(1)
        first, begun, used, answers = place(run), time.monotonic(), processor_seconds(server.pid), 0
        while (passed := time.monotonic() - begun) < seconds:
            ask()
            time.sleep(min(POLL_SECONDS, max(0.0, seconds - passed)))
        took, used = time.monotonic() - begun, processor_seconds(server.pid) - used
        return {
            "tokens_per_second": speed(first, place(run)), "seconds": took, "core_share": used / took, "answers": answers,
            "answer_bytes": size,
        }  # fmt: skip


def speed(first, last):
    if last[0] == first[0]:
        sys.exit("no step was logged in a stretch; give --seconds with more")
    return (last[1] - first[1]) / (last[0] - first[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the training")
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with TemporaryDirectory() as work:
        run = Path(work) / "run"
        text = "".join(f"def function_{n}(argument):\n    return argument + {n % 97}\n" for n in range(20_000))
        (Path(work) / "text.py").write_text(text)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in MODEL.items()]
        with process("train", str(Path(work) / "text.py"), "--output-dir", str(run), *flags, threads=given.threads) as training:
            while not (run / "metrics.jsonl").exists() or place_or_none(run) is None:
                if training.poll() is not None:
                    sys.exit(f"the training ended: {training.stderr.read()[-500:]}")
                time.sleep(0.5)
            rounds = []
            for number in range(given.pairs):
                order = (False, True) if number % 2 == 0 else (True, False)
                pair = {watched: stretch(run, given.seconds, watched, given.threads) for watched in order}
                ratio = pair[True]["tokens_per_second"] / pair[False]["tokens_per_second"]
                rounds.append({"alone": pair[False], "watched": pair[True], "ratio": ratio})
                alone, watched = pair[False], pair[True]
                print(
                    f"pair {number + 1}: alone {alone['tokens_per_second']:,.0f} tok/s, watched "
                    f"{watched['tokens_per_second']:,.0f}, ratio {ratio:.3f}; server {watched['core_share']:.2%} of a core, "
                    f"{watched['answers']} answers of {watched['answer_bytes'] / 1000:,.0f} kB",
                    flush=True,
                )
    ratios = [found["ratio"] for found in rounds]
    share = statistics.median(found["watched"]["core_share"] for found in rounds)
    print(
        f"watched / alone: median {statistics.median(ratios):.3f}, {min(ratios):.3f} – {max(ratios):.3f}; the server used "
        f"{share:.2%} of a core, {share / given.threads:.2%} of the training's {given.threads}; load before {load:.1f}"
    )
    line = provenance("watch.py") | {
        "load_before": round(load, 2), "threads": given.threads, "seconds": given.seconds, "model": MODEL,
        "ratio_median": statistics.median(ratios), "core_share_median": share, "pairs": rounds,
    }  # fmt: skip
    if not given.no_record:
        with HISTORY.open("a") as file:
            file.write(json.dumps(line) + "\n")


def place_or_none(run):
    try:
        return place(run)
    except (OSError, IndexError, KeyError, ValueError):
        return None


if __name__ == "__main__":
    main()
