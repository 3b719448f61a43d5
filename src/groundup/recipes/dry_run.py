"""
How much a pass of so many windows takes, tried out on throw-away weights in a process of its own: memory and seconds.

``python -m groundup.recipes.dry_run`` reads a ``DryRun`` from standard input, as JSON, and writes an ``Attempt`` a line.
It is a process of its own because some attempts do not fit: where the kernel ends one, it ends this one.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from groundup.errors import ResourceError
from groundup.model.checkpointed import checkpoint_activations
from groundup.model.gpt2 import GPT2Config
from groundup.model.initial import initialize
from groundup.model.loss import next_token_loss, next_token_scores
from groundup.model.variants import build_gpt2
from groundup.optim.optimizers import build_optimizer
from groundup.runtime.device import explained_memory_errors, synchronize
from groundup.runtime.memory import (
    available_bytes,
    be_the_first_victim,
    confine,
    peak_resident_bytes,
    restart_peak,
    return_freed_memory,
)

SHARE, RESERVE_BYTES = 0.8, 2**28
"""Of the memory that is available a size may take this share, and on the host it leaves so much: a run also loads the
libraries that draw and sample, reads ahead, and saves."""
GAIN = 1.05
"""Two doublings must make a pass this much faster, or the search ends."""
TRAIN_SECONDS, EVALUATION_SECONDS = 14.0, 20.0
"""No size is begun that would end later than this after the start."""
TIMED_SECONDS = 0.15
"""A size is timed for so long, and at least once: as long for each, so that what else the machine does slows all alike."""
STATE_PER_WEIGHT = {"adamw_torch_fused": 2, "adamw_torch": 2, "muon": 1}
"""Numbers that an optimizer keeps for each weight at least."""

Run = Callable[[int], tuple[int, float, float]]
"""From windows in a pass to (bytes at the peak, seconds of a pass, seconds of an update)."""


@dataclass(frozen=True)
class DryRun:
    """What to try, in JSON's types, because it is sent to another process."""

    model: dict[str, Any]
    """The fields of ``GPT2Config``."""
    device: str
    dtype: str
    """What products are computed in: float32, bfloat16 or float16."""
    train_windows: int
    """Windows of a training pass at most; 0 tries none."""
    eval_windows: int
    """Windows of an evaluation's pass at most; 0 tries none."""
    optimizer: dict[str, Any] | None
    """Arguments of ``build_optimizer``; None where nothing is trained."""
    activation_checkpointing: bool
    ema: bool
    """Whether a moving average of the weights is kept."""
    freeze: list[str]
    threads: int
    room_bytes: int
    """Memory that a size may take."""
    process_room: dict[str, int]
    """The same under the limits of ``ulimit``, by name; enforced, so that an attempt beyond is refused and not killed."""


@dataclass(frozen=True)
class Attempt:
    """A size that was tried, or that was predicted not to fit."""

    kind: str
    """train or evaluate."""
    size: int
    """Windows in the pass."""
    fits: bool
    need_bytes: int
    """Everything held at the peak, weights and optimizer included; where it does not fit, what it takes at least."""
    seconds: float = 0.0
    """Of one pass: forward, and in training backward."""
    update_seconds: float = 0.0
    """Of the update that follows the passes of a step."""

    @property
    def windows_per_second(self) -> float:
        """The speed of the passes alone: updates are as many whatever the size."""
        return self.size / self.seconds


def room_in(free_bytes: int, device: str) -> int:
    """What a size may take of so much memory."""
    reserve = 0 if device == "cuda" else RESERVE_BYTES
    return max(0, min(int(SHARE * free_bytes), free_bytes - reserve))


def sizes_up_to(most: int) -> Iterator[int]:
    """1, 2, 4, … and ``most`` itself."""
    size = 1
    while size < most:
        yield size
        size *= 2
    if most:
        yield most


def predicted_bytes(tried: Sequence[Attempt], size: int, fixed_bytes: int) -> int:
    """What a size will need: on the line through the last two attempts; after one, all but ``fixed_bytes`` grows with it."""
    last = tried[-1]
    if len(tried) == 1:
        return fixed_bytes + max(0, last.need_bytes - fixed_bytes) * size // last.size
    before = tried[-2]
    growth = max(0, last.need_bytes - before.need_bytes) / (last.size - before.size)
    return math.ceil(last.need_bytes + growth * (size - last.size))


def brings_nothing(tried: Sequence[Attempt]) -> bool:
    """Whether the last two sizes were not faster than those before."""
    speeds = [attempt.windows_per_second for attempt in tried]
    return len(speeds) > 2 and max(speeds[-2:]) < GAIN * max(speeds[:-2])


def attempts(kind: str, most: int, run: Run, *, fixed_bytes: int, room_bytes: int, end: float) -> Iterator[Attempt]:
    """
    Try growing sizes, until one does not fit, larger ones are not faster, or time is up.

    Args:
        run: tries a size; ResourceError where it is refused.
        fixed_bytes: of weights and optimizer, whatever the size.
        end: of the search, on the monotonic clock; the first size is always tried.
    """
    tried: list[Attempt] = []
    took = 0.0
    for size in sizes_up_to(most):
        if tried:
            expected = predicted_bytes(tried, size, fixed_bytes)
            if expected > room_bytes:
                yield Attempt(kind, size, False, expected)
                return
            if brings_nothing(tried) or time.monotonic() + took * size / tried[-1].size > end:
                return
        started = time.monotonic()
        try:
            with explained_memory_errors():
                need, seconds, update_seconds = run(size)
        except ResourceError:
            yield Attempt(kind, size, False, max(room_bytes, fixed_bytes))
            return
        took = time.monotonic() - started
        # One window that ran is taken, however near the edge: there is nothing smaller.
        attempt = Attempt(kind, size, need <= room_bytes or size == 1, need, seconds, update_seconds)
        yield attempt
        if not attempt.fits:
            return
        tried.append(attempt)


class _Rehearsal:
    """Random weights and their optimizer, and passes over random tokens, as a run makes them."""

    def __init__(self, asked: DryRun):
        self.device = torch.device(asked.device)
        self.dtype = getattr(torch, asked.dtype)
        self.base = 0 if self.device.type == "cuda" else self._peak(restart=True)
        with torch.device("meta"):
            self.model = build_gpt2(GPT2Config(**asked.model))
        if asked.activation_checkpointing:
            checkpoint_activations(self.model)
        if asked.freeze:
            from groundup.recipes.initial import freeze  # here, because it brings the tokenizers

            freeze(self.model, tuple(asked.freeze), "freeze")
        self.ema = asked.ema
        self.asked = asked

    @property
    def fixed_bytes(self) -> int:
        """What weights, gradients and the optimizer's state take at least."""
        copies = 0
        if self.asked.optimizer is not None:
            copies = 1 + STATE_PER_WEIGHT.get(self.asked.optimizer["optim"], 0)
        return sum(p.numel() * 4 * (1 + self.ema + copies * p.requires_grad) for p in self.model.parameters())

    def prepare(self) -> None:
        """Make the weights and, by a first step, everything that stays: the optimizer's state, and the libraries' own."""
        self.model.to_empty(device=self.device)
        initialize(self.model, torch.Generator(self.device).manual_seed(0))
        self.average = [p.detach().clone() for p in self.model.parameters()] if self.ema else []
        if self.asked.optimizer is not None:
            self.optimizer = build_optimizer(self.model, **self.asked.optimizer)
            self._training_pass(self._tokens(1))
            self.optimizer.step()

    def train(self, size: int) -> tuple[int, float, float]:
        """Passes of a step and its update: (bytes at the peak, seconds of a pass, seconds of the update)."""
        self.model.train()
        tokens = self._tokens(size)
        # The later passes of a step find the gradients of the first and add to them: that is where most is held.
        once = size == self.asked.train_windows
        self._peak(restart=True)
        seconds = self._timed(lambda: self._training_pass(tokens, forget=once))
        started = self._clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_seconds = self._clock() - started
        return self._peak() - self.base, seconds, update_seconds

    def evaluate(self, size: int) -> tuple[int, float, float]:
        """A pass without gradients: (bytes at the peak, seconds of it, 0)."""
        self.model.eval()
        tokens = self._tokens(size)
        self._peak(restart=True)
        seconds = self._timed(lambda: self._evaluation_pass(tokens))
        return self._peak() - self.base, seconds, 0.0

    def forget(self) -> None:
        """Let go of the gradients, and of what an attempt that was refused has left."""
        for parameter in self.model.parameters():
            parameter.grad = None
        gc.collect()
        return_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _tokens(self, size: int) -> torch.Tensor:
        config = self.model.config
        return torch.randint(config.vocab_size, (size, config.n_positions + 1), device=self.device)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)

    def _training_pass(self, tokens: torch.Tensor, forget: bool = False) -> None:
        if forget:
            self.optimizer.zero_grad()
        with self._autocast():
            hidden = self.model(tokens[:, :-1])
            loss = next_token_loss(hidden, self.model.head_weight, tokens[:, 1:]) / tokens.numel()
        loss.backward()  # type: ignore[no-untyped-call]

    def _evaluation_pass(self, tokens: torch.Tensor) -> None:
        with torch.no_grad(), self._autocast():
            next_token_scores(self.model(tokens[:, :-1]), self.model.head_weight, tokens[:, 1:])

    def _timed(self, run: Callable[[], None]) -> float:
        """The mean of a few runs, in seconds, after one to warm up."""
        run()
        started, count = self._clock(), 0
        while not count or self._clock() - started < TIMED_SECONDS:
            run()
            count += 1
        return (self._clock() - started) / count

    def _clock(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _peak(self, restart: bool = False) -> int:
        """The most bytes held since the last restart: of the device's memory on CUDA, else of the process."""
        if self.device.type == "cuda":
            if restart:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated()
        if restart:
            restart_peak()
        # The driver keeps what it has taken until it is asked for it, so that is a peak too.
        on_gpu = torch.mps.driver_allocated_memory() if self.device.type == "mps" else 0
        return peak_resident_bytes() + on_gpu


def rehearse(asked: DryRun, say: Callable[[Attempt], None]) -> None:
    """Try training passes, then passes of an evaluation beside the same weights and optimizer, and say each attempt."""
    begun = time.monotonic()
    if asked.device == "cpu":
        torch.set_num_threads(asked.threads)
    rehearsal = _Rehearsal(asked)
    free, _ = available_bytes(asked.device)
    confine(asked.process_room)
    room, fixed = min(asked.room_bytes, room_in(free, asked.device)), rehearsal.fixed_bytes
    first = "train" if asked.train_windows else "evaluate"
    try:
        if fixed > room:  # not even the weights: the machine is spared the attempt
            raise ResourceError
        with explained_memory_errors():
            rehearsal.prepare()
    except ResourceError:
        say(Attempt(first, 1, False, max(room, fixed)))
        return
    kinds: list[tuple[str, int, Run, float]] = [
        ("train", asked.train_windows, rehearsal.train, TRAIN_SECONDS),
        ("evaluate", asked.eval_windows, rehearsal.evaluate, EVALUATION_SECONDS),
    ]
    for kind, most, run, seconds in kinds:
        for attempt in attempts(kind, most, run, fixed_bytes=fixed, room_bytes=room, end=begun + seconds):
            say(attempt)
        rehearsal.forget()


def main() -> None:
    """Try what standard input asks for."""
    asked = DryRun(**json.load(sys.stdin))
    be_the_first_victim()
    rehearse(asked, lambda attempt: print(json.dumps(asdict(attempt)), flush=True))


if __name__ == "__main__":
    main()
