"""``auto`` as a batch size: which sizes are tried, which is taken, what is remembered, and what a killed trial leaves."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from groundup.errors import ResourceError
from groundup.model.gpt2 import GPT2Config
from groundup.recipes import batch_size, dry_run
from groundup.recipes.batch_size import BatchSizes, chosen, fitting_batch_sizes
from groundup.recipes.dry_run import Attempt, DryRun, attempts, predicted_bytes, rehearse, room_in, sizes_up_to
from groundup.runtime.device import choose_machine

MIB = 2**20
TINY = GPT2Config(vocab_size=257, n_positions=16, n_embd=16, n_layer=2, n_head=2)
ADAMW = {
    "optim": "adamw_torch_fused", "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1,
    "weight_decay_type": "decoupled", "sgd_momentum": 0.9, "muon_momentum": 0.95,
}  # fmt: skip
ASKED = DryRun(
    model=asdict(TINY), device="cpu", dtype="float32", train_windows=8, eval_windows=4, optimizer=ADAMW,
    activation_checkpointing=False, ema=False, freeze=[], threads=1, room_bytes=2**40, process_room={},
)  # fmt: skip


def sized(train=8, evaluation=4, say=lambda line: None, config=TINY, **options):
    return fitting_batch_sizes(
        config, choose_machine("cpu", False), train_windows=train, eval_windows=evaluation, optimizer=ADAMW, say=say, **options
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "groundup" / "batch_sizes.json"


def child(tmp_path, monkeypatch, code):
    """Let another program be the dry run; it finds what is asked in ``asked``."""
    path = tmp_path / "child.py"
    path.write_text(f"import json, os, signal, sys, time\nasked = json.load(sys.stdin)\n{code}")
    monkeypatch.setattr(batch_size, "COMMAND", (str(path),))


def lines(*found):
    """Code that reports attempts."""
    return "".join(f"print({json.dumps(asdict(a))!r}, flush=True)\n" for a in found)


@pytest.mark.parametrize(("most", "sizes"), [(0, []), (1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (11, [1, 2, 4, 8, 11])])
def test_sizes_double_up_to_the_global_batch(most, sizes):
    assert list(sizes_up_to(most)) == sizes


def test_memory_is_predicted_on_a_line():
    one, two, four = (Attempt("train", n, True, 100 + 10 * n, 1.0) for n in (1, 2, 4))
    assert predicted_bytes([one], 2, fixed_bytes=100) == 120
    assert predicted_bytes([one, two, four], 11, fixed_bytes=0) == 210
    # What shrinks is noise.
    assert predicted_bytes([replace(one, need_bytes=200), two], 4, fixed_bytes=0) == 120


def test_a_run_keeps_some_memory_for_the_rest_of_what_it_does():
    assert room_in(10_000 * MIB, "cpu") == 8_000 * MIB
    assert room_in(1_000 * MIB, "cpu") == 744 * MIB
    assert room_in(100 * MIB, "cpu") == 0
    # What a run does besides is not done on the device.
    assert room_in(1_000 * MIB, "cuda") == 800 * MIB


def search(run, most=64, fixed=100, room=10_000, seconds=60.0):
    return list(attempts("train", most, run, fixed_bytes=fixed, room_bytes=room, end=time.monotonic() + seconds))


def faster_and_faster(size):
    return 100 + 10 * size, float(size) ** 0.5, 0.0


def test_growing_ends_at_the_global_batch():
    found = search(faster_and_faster, most=10)
    assert [(a.size, a.fits) for a in found] == [(1, True), (2, True), (4, True), (8, True), (10, True)]


def test_growing_ends_before_what_will_not_fit():
    found = search(faster_and_faster, room=300)
    assert [(a.size, a.fits, a.need_bytes) for a in found[-2:]] == [(16, True, 260), (32, False, 420)]


@pytest.mark.parametrize(
    "refusal", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(), torch.OutOfMemoryError("CUDA")]
)
def test_growing_ends_where_memory_is_refused(refusal):
    def run(size):
        if size == 4:
            raise refusal
        return faster_and_faster(size)

    assert [(a.size, a.fits) for a in search(run)] == [(1, True), (2, True), (4, False)]


def test_other_errors_are_not_about_memory():
    with pytest.raises(RuntimeError, match="must match the size"):
        search(lambda size: torch.zeros(2) + torch.zeros(3) if size == 2 else faster_and_faster(size), most=2)
    with pytest.raises(RuntimeError, match="no words of memory"):
        search(lambda size: (_ for _ in ()).throw(RuntimeError("no words of memory")))


def test_growing_ends_where_two_doublings_bring_nothing():
    seconds = {1: 1.0, 2: 1.5, 4: 2.95, 8: 5.8, 16: 1.0}
    found = search(lambda size: (100, seconds[size], 0.0))
    assert [a.size for a in found] == [1, 2, 4, 8]
    # One that brings nothing may be bad luck: the last is no faster than the first, but the one before it is.
    assert not dry_run.brings_nothing([attempt(1, 10), attempt(2, 20), attempt(4, 10)])
    assert not dry_run.brings_nothing([attempt(1, 10), attempt(2, 5)])


def test_the_first_size_is_tried_however_late_and_no_other():
    assert [a.size for a in search(faster_and_faster, seconds=-1)] == [1]


def test_a_size_that_took_more_than_its_room_does_not_fit_unless_it_is_the_smallest():
    grown = {1: 100, 2: 110, 4: 999}
    found = search(lambda size: (grown[size], 1.0, 0.0), room=200)
    assert [(a.size, a.fits) for a in found] == [(1, True), (2, True), (4, False)]
    assert [(a.size, a.fits) for a in search(lambda size: (999, 1.0, 0.0), room=200)] == [(1, True), (2, False)]


def attempt(size, windows_per_second, kind="train", fits=True, need=MIB):
    return Attempt(kind, size, fits, need, size / windows_per_second, 0.5)


def test_the_fastest_is_taken_and_of_equals_the_smallest():
    found = [attempt(1, 10), attempt(2, 19.5), attempt(4, 20), attempt(8, 12), attempt(16, 50, fits=False)]
    found += [attempt(1, 1, "evaluate"), attempt(2, 2, "evaluate"), attempt(4, 4, "evaluate")]
    sizes = chosen(found, ASKED, "much")
    assert (sizes.train, sizes.evaluation) == (2, 4)
    # 8 windows of 16 tokens: 8 / 19.5 s of passes and an update of half a second.
    assert sizes.tokens_per_second == pytest.approx(8 * 16 / (8 / 19.5 + 0.5))


def test_an_evaluation_that_was_not_reached_takes_no_more_than_training():
    assert chosen([attempt(8, 1)], ASKED, "much").evaluation == 4
    assert chosen([attempt(2, 1)], ASKED, "much").evaluation == 2


def test_what_is_not_asked_for_is_nothing():
    assert chosen([attempt(2, 1)], replace(ASKED, eval_windows=0), "much").evaluation == 0
    assert chosen([attempt(2, 1, "evaluate")], replace(ASKED, train_windows=0), "much").train == 0


def test_nothing_fits_is_one_line_with_numbers_and_advice():
    found = [attempt(1, 1, fits=False, need=3 * 2**30)]
    with pytest.raises(ResourceError) as caught:
        chosen(found, replace(ASKED, room_bytes=2**30), "1.2 GiB free on this machine")
    assert str(caught.value) == (
        "per_device_train_batch_size: auto found no size: one window of 16 tokens needs more than 3.0 GiB, and of 1.2 GiB free "
        "on this machine a run may take 1.0 GiB; take a smaller --model, a shorter --n-positions or "
        "--activation-checkpointing, "
        "or free some memory"
    )
    with pytest.raises(ResourceError, match=r"model or a shorter --n-positions, or free"):
        chosen([], replace(ASKED, activation_checkpointing=True), "little")
    with pytest.raises(ResourceError, match=r"per_device_eval_batch_size: .* does not fit"):
        chosen([], replace(ASKED, train_windows=0), "little")


def test_a_killed_trial_leaves_the_last_good_size(tmp_path, monkeypatch, cache):
    child(tmp_path, monkeypatch, lines(attempt(1, 1), attempt(2, 2)) + "os.kill(os.getpid(), signal.SIGKILL)\n")
    sizes = sized()
    assert (sizes.train, sizes.evaluation) == (2, 2)


def test_a_trial_killed_at_once_means_that_nothing_fits(tmp_path, monkeypatch, cache):
    child(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(ResourceError, match="auto found no size: one window of 16 tokens does not fit"):
        sized()
    assert not cache.exists()


def test_a_trial_that_fails_says_why(tmp_path, monkeypatch, cache):
    child(tmp_path, monkeypatch, "raise ValueError('of its own making')\n")
    with pytest.raises(ResourceError, match=r"exit code 1 \(ValueError: of its own making\); give --per-device-train"):
        sized()


def test_a_trial_that_does_not_end_is_ended(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(batch_size, "PATIENCE_SECONDS", 0.1)
    child(tmp_path, monkeypatch, "print('a warning')\n" + lines(attempt(4, 1)) + "time.sleep(100)\n")
    started = time.monotonic()
    assert sized().train == 4
    assert time.monotonic() - started < 50


def test_an_interrupt_ends_the_trial(tmp_path, monkeypatch, cache):
    child(tmp_path, monkeypatch, lines(attempt(4, 1)) + "time.sleep(100)\n")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(batch_size.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])
    monkeypatch.setattr(batch_size, "Attempt", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sized()
    assert started[0].returncode is not None
    assert time.monotonic() - begun < 50


def test_what_is_remembered_is_not_tried_again(tmp_path, monkeypatch, cache):
    said = []
    child(tmp_path, monkeypatch, lines(attempt(4, 100, need=MIB), attempt(2, 100, "evaluate")))
    first = sized(say=said.append)
    child(tmp_path, monkeypatch, "raise SystemExit('a second trial')\n")
    assert sized(say=said.append) == first
    assert said[0].startswith("batch size: 4 windows a pass, evaluation 2 (auto: the fastest of 1–4 that fit into ")
    assert said[0].endswith(f"; remembered in {cache}")
    assert said[1] == f"batch size: 4 windows a pass, evaluation 2 (auto: remembered in {cache})"
    for change in (
        {"config": replace(TINY, n_layer=3)}, {"train": 16}, {"evaluation": 8}, {"activation_checkpointing": True},
        {"torch_compile": True}, {"ema": True}, {"freeze": ("wte*",)},
    ):  # fmt: skip
        with pytest.raises(ResourceError, match="a second trial"):
            sized(**change)


def test_what_is_remembered_must_fit_today(tmp_path, monkeypatch, cache):
    child(tmp_path, monkeypatch, lines(attempt(4, 100, need=MIB)))
    monkeypatch.setattr(dry_run, "RESERVE_BYTES", 0)
    monkeypatch.setattr(batch_size, "available_bytes", lambda device: (int(1.9 * MIB), "in this test"))
    assert sized().train == 4
    child(tmp_path, monkeypatch, lines(attempt(1, 100, need=MIB // 2)))
    assert sized().train == 4
    # As coarsely as it is remembered this is as much, but it is not enough.
    monkeypatch.setattr(batch_size, "available_bytes", lambda device: (int(1.1 * MIB), "in this test"))
    assert sized().train == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: "[]", lambda text: text[: len(text) // 2], lambda text: text.replace("4", '"4"'),
        lambda text: text.replace(": 4", ": 9"), lambda text: text.replace('"train"', '"trane"'), lambda text: "[" * 10**5,
        lambda text: text.replace('"version": 1', '"version": 2'),
    ],
)  # fmt: skip
def test_a_damaged_memory_is_no_error(tmp_path, monkeypatch, cache, damage):
    child(tmp_path, monkeypatch, lines(attempt(4, 128, need=MIB), attempt(4, 128, "evaluate")))
    first = sized()
    text = cache.read_text()
    assert damage(text) != text
    cache.write_text(damage(text))
    said = []
    assert sized(say=said.append) == first
    assert "the fastest of" in said[0]
    # And it is whole again.
    said.clear()
    assert sized(say=said.append) == first
    assert "(auto: remembered" in said[0]


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, cache):
    (tmp_path / "cache").write_text("a file where the folder would be")
    child(tmp_path, monkeypatch, lines(attempt(4, 100)))
    said = []
    assert sized(say=said.append).train == 4
    assert "remembered" not in said[0]


def test_the_memory_does_not_grow_for_ever(cache, monkeypatch):
    monkeypatch.setattr(batch_size, "REMEMBERED", 3)
    for n in range(5):
        assert batch_size._remember(cache, str(n), BatchSizes(n, n))
    assert list(json.loads(cache.read_text())["answers"]) == ["2", "3", "4"]


def rehearsed(**changes):
    found = []
    rehearse(replace(ASKED, threads=torch.get_num_threads(), **changes), found.append)
    return found


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(dry_run, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(dry_run, "brings_nothing", lambda tried: False)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"activation_checkpointing": True}, {"ema": True},
        {"freeze": ["wte*", "h.0.*"]}, {"optimizer": {**ADAMW, "optim": "sgd"}}, {"optimizer": {**ADAMW, "optim": "adafactor"}},
    ],
)  # fmt: skip
def test_every_kind_of_training_can_be_rehearsed(brief, changes):
    found = rehearsed(**changes)
    assert [(a.kind, a.size) for a in found if a.fits] == [("train", n) for n in (1, 2, 4, 8)] + [
        ("evaluate", n) for n in (1, 2, 4)
    ]
    assert all(a.seconds > 0 for a in found)


def test_an_evaluation_alone_needs_no_optimizer(brief):
    assert {a.kind for a in rehearsed(train_windows=0, optimizer=None)} == {"evaluate"}


def test_a_model_that_is_too_large_by_itself_is_not_even_made(brief):
    (only,) = rehearsed(model={**asdict(TINY), "n_embd": 2**16, "n_layer": 96}, room_bytes=2**30)
    assert (only.kind, only.size, only.fits) == ("train", 1, False)
    # 12 C² of each block, 16 bytes each: the weights, their gradients and two moments.
    assert only.need_bytes == pytest.approx(16 * 96 * 12 * 2**32, rel=0.01)


def test_a_real_trial_in_its_own_process(cache):
    said = []
    sizes = sized(2, 1, say=said.append)
    assert sizes.train in (1, 2)
    assert sizes.evaluation == 1
    assert 0 < sizes.train_bytes < 2**30
    assert len(said) == 1
    assert sized(2, 1, say=said.append) == sizes
    assert "(auto: remembered" in said[1]


UNDER_A_LIMIT = """
import json, resource, sys
from tests.test_batch_size import sized
from groundup.errors import ResourceError
from groundup.model.gpt2 import GPT2Config
from groundup.runtime.memory import read_table
from pathlib import Path
base = read_table(Path("/proc/self/status"))["VmSize"]
limit = base + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
config = GPT2Config(vocab_size=257, n_positions=256, n_embd=256, n_layer=6, n_head=4)
try:
    sizes = sized(32, 8, config=config)
    print(json.dumps([sizes.train, sizes.evaluation, sizes.train_bytes]))
except ResourceError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v is enforced by Linux")
def test_under_a_limit_sizes_are_smaller_and_nobody_dies(cache):
    """Speeds are noise, so the limit is made to bind: 6 blocks of 256 at 256 tokens keep about 30 MiB a window."""

    def under(mebibytes):
        done = subprocess.run(
            [sys.executable, "-c", UNDER_A_LIMIT, str(mebibytes)], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    train, evaluation, train_bytes = under(600)
    assert 1 <= train <= 8
    assert 1 <= evaluation <= 8
    assert train_bytes < 600 * MIB
    nothing = under(270)
    assert nothing.startswith("per_device_train_batch_size: auto found no size: one window of 256 tokens needs more than")
    assert "left of ulimit -v" in nothing


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a peak cannot begin anew")
def test_the_memory_said_is_that_of_the_weights_and_of_each_window(cache, monkeypatch):
    """Against arithmetic: 16 bytes a parameter; and activations, of which a block keeps 12 to 24 times T C numbers."""
    # Freed memory goes back at once, so that the C library's holes do not count (mallopt(3), M_MMAP_THRESHOLD).
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=256, n_layer=8, n_head=4)
    asked = replace(ASKED, model=asdict(config), train_windows=16, eval_windows=0)

    def needs(asked):
        found = {a.size: a.need_bytes for a in batch_size._tried(asked)}
        return found[1], (found[4] - found[1]) / 3

    one, window = needs(asked)
    assert one > 16 * (12 * 8 * 256**2 + (257 + 256) * 256) + window
    assert 12 < window / (8 * 256 * 256 * 4) < 24
    _, with_checkpointing = needs(replace(asked, activation_checkpointing=True))
    assert with_checkpointing < window / 2
