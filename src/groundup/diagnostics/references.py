"""
Is my loss normal? Losses of known settings, each with where it is from, and what they say about a run.

Two texts that are the same have equal ``content_sha256`` in dataset.json; only then are losses compared one to one. All is in
nats per byte, so that tokenizers do not matter: tiny Shakespeare is ASCII, and nanoGPT's characters are its bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundup.diagnostics.check import Check
from groundup.diagnostics.run import series
from groundup.tracking.metrics import number

TINY_SHAKESPEARE = "83a430baee81938d9981ec81190c5e01fa1e5952987593734e3a21ea2ea508d4"
"""``content_sha256`` of https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt."""
NANOGPT = "https://github.com/karpathy/nanoGPT#readme"
ROOM = 0.15
"""
Nats per byte above a reference that are normal. Of the settings measured on one shape, those that people choose on purpose
(other schedules, initial weights, optimizers, label smoothing) came within 0.12; without norms it was 0.40, with norms behind
1.33, with coupled weight decay 0.69.
"""
ROOM_PER_HALVING = 0.12
"""
A model half as large has so much more: between nanoGPT's two settings, with 13 times the weights and 50 times the tokens, it is
0.11 a doubling.
"""
TOO_GOOD = 0.6
"""
Nats per byte of prose below which a small model cannot honestly be: GPT-2's 3.11 nats per token of web text, of four to five
bytes, are 0.7.
"""
SMALLEST_SHARE = 1 / 8
"""Of a reference's weights: models that are smaller still are not compared."""
BASELINE_STEPS, BASELINE_TOKENS = 200, 500_000
"""From so much on a run knows more than how often bytes occur; at 200,000 tokens the slowest healthy ones did."""
# Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556), equation 10: nats per token of web text from N weights and D
# tokens, fitted on 70 million weights and 5 billion tokens upwards. Another text, another vocabulary: a rough band, no more.
LAW = (1.69, 406.4, 0.34, 410.7, 0.28)
LAW_FROM_WEIGHTS, LAW_FROM_TOKENS, LAW_FROM_VOCABULARY = 2e7, 2e8, 8_000
LAW_BAND = (0.5, 1.35)


@dataclass(frozen=True)
class Reference:
    """A known setting, and how its validation loss fell."""

    name: str
    source: str
    """Where the figures are from."""
    content_sha256: str
    n_layer: int
    n_embd: int
    curve: tuple[tuple[int, float], ...]
    """(tokens seen, validation loss in nats per byte)."""

    @property
    def weights(self) -> int:
        """Weights of the blocks: 12 · L · C²."""
        return 12 * self.n_layer * self.n_embd**2


REFERENCES = (
    Reference(
        "4 layers × 128, context 64, 500 steps of 2,048 bytes",
        "measured, mean of two seeds: benchmarks/history/settings.jsonl, base",
        TINY_SHAKESPEARE, 4, 128,
        ((204_800, 2.457), (409_600, 2.261), (614_400, 2.144), (819_200, 2.061), (1_024_000, 2.017)),
    ),
    Reference(
        "nanoGPT's laptop setting: 4 layers × 128, context 64, 2,000 steps of 768 characters",
        f"{NANOGPT} says 1.88 from 20 batches; measured again on the whole split: 1.898",
        TINY_SHAKESPEARE, 4, 128, ((1_536_000, 1.898),),
    ),
    Reference(
        "nanoGPT's GPU setting: 6 layers × 384, context 256, dropout 0.2, 5,000 steps of 16,384 characters",
        f"{NANOGPT}, the best of its evaluations",
        TINY_SHAKESPEARE, 6, 384, ((81_920_000, 1.4697),),
    ),
)  # fmt: skip
PUBLISHED_124M = (
    f"published for 12 layers × 768 on OpenWebText, in nats per token: GPT-2's own weights 3.11, trained on it 2.85 ({NANOGPT})"
)


@dataclass(frozen=True)
class Standing:
    """Where a run stands."""

    content_sha256: str
    """Of its text; empty where that is not known."""
    n_layer: int
    n_embd: int
    vocab_size: int
    baseline_bits_per_byte: float | None = None
    """Of the frequencies of bytes alone, on its validation text."""
    pretrained: bool = False
    """It started from somebody's weights."""


def baseline_check(rows: Sequence[Mapping[str, Any]], standing: Standing) -> Check:
    """Does it know more than how often each byte occurs?"""
    steps, bits = series(rows, "eval_bits_per_byte")
    _, tokens = series(rows, "num_input_tokens_seen")
    name, baseline = "run_baseline", standing.baseline_bits_per_byte
    if not len(bits) or baseline is None:
        return Check(name, "run", None, "no evaluation is logged", "bits per byte of an evaluation")
    measured = f"{bits[-1]:.3f} bits per byte at step {int(steps[-1]):,}"
    expected = (
        f"below {baseline:.3f}, which the frequencies of bytes alone give on this text, after {BASELINE_STEPS} steps and "
    )
    expected += f"{BASELINE_TOKENS:,} tokens"
    if steps[-1] < BASELINE_STEPS or tokens[-1] < BASELINE_TOKENS:
        passed = True if bits[-1] < baseline else None
        return Check(name, "run", passed, measured + ("" if passed else ": too early to tell"), expected)
    passed = bool(bits[-1] < baseline)
    advice = "" if passed else "it has learned how often bytes occur and no more: run the checks of the model and of learning"
    return Check(name, "run", passed, measured, expected, advice, "" if passed else "not_learning",
                 {"bits_per_byte": float(bits[-1]), "baseline": baseline})  # fmt: skip


def reference_check(rows: Sequence[Mapping[str, Any]], standing: Standing) -> Check:
    """
    The last validation loss beside that of known settings on the same text, or, on other text, beside a scaling law.

    Returns:
        A check whose ``expected`` names the reference and where it is from; without a verdict where none is comparable.
    """
    name = "run_reference"
    evaluated = [
        row for row in rows if not any(math.isnan(number(row.get(key))) for key in ("eval_loss", "eval_bits_per_byte"))
    ]
    if not evaluated:
        return Check(name, "run", None, "no evaluation is logged", "an evaluation, to compare")
    row = evaluated[-1]
    read = number(row.get("num_input_tokens_seen"))
    loss, tokens = float(row["eval_bits_per_byte"]) * math.log(2), 0 if math.isnan(read) else int(read)
    measured = f"{loss:.3f} nats per byte after {tokens:,} tokens"
    weights = 12 * standing.n_layer * standing.n_embd**2
    known = [reference for reference in REFERENCES if reference.content_sha256 == standing.content_sha256]
    if not known:
        return _by_law(name, float(row["eval_loss"]), tokens, weights, standing)
    near = _nearest(known, weights, tokens)
    if near is None or standing.pretrained:
        why = "it started from trained weights" if standing.pretrained else "no reference is near enough in size and tokens"
        alike = min(known, key=lambda reference: abs(math.log(weights / reference.weights)))
        return Check(name, "run", None, f"{measured}; {why}", f"the most alike is {_shown(alike)}")
    usual = _loss_at(near, tokens)
    room = ROOM + ROOM_PER_HALVING * max(0.0, math.log2(near.weights / weights))
    expected = f"at most {usual + room:.2f}: {usual:.3f} is {near.name} ({near.source}), and {room:.2f} is normal variation"
    details = {"reference": near.name, "source": near.source, "usual": usual, "room": room, "loss": loss, "tokens": tokens}
    if loss < TOO_GOOD:
        advice = "too good to be true: look for validation text in the training text, and for a model that sees the future"
        return Check(name, "run", False, measured, f"{expected}; at least {TOO_GOOD:g}", advice, "leak", details)
    passed = loss <= usual + room
    advice = (
        "worse than known settings of this size: compare the options with them (learning rate, batch, norms, initial weights)"
    )
    return Check(
        name, "run", passed, measured, expected, "" if passed else advice, "" if passed else "worse_than_known", details
    )


def law_loss(weights: float, tokens: float) -> float:
    """Nats per token by the scaling law of Hoffmann et al. 2022, for web text."""
    base, a, alpha, b, beta = LAW
    return float(base + a / weights**alpha + b / tokens**beta)


def _by_law(name: str, loss: float, tokens: int, weights: int, standing: Standing) -> Check:
    """A rough band, where the law says anything at all."""
    measured = f"{loss:.3f} nats per token after {tokens:,} tokens"
    published = PUBLISHED_124M if (standing.n_layer, standing.n_embd) == (12, 768) else ""
    inside = weights >= LAW_FROM_WEIGHTS and tokens >= LAW_FROM_TOKENS and standing.vocab_size >= LAW_FROM_VOCABULARY
    if not inside or standing.pretrained:
        expected = "no reference for this text; the scaling law begins at 20 million weights and 200 million tokens"
        said = f"{measured}; no loss of this text is known"
        return Check(name, "run", None, said, "; ".join(filter(None, (expected, published))))
    predicted = law_loss(weights, tokens)
    low, high = LAW_BAND[0] * predicted, LAW_BAND[1] * predicted
    passed = low <= loss <= high
    expected = (
        f"roughly {low:.1f} to {high:.1f}: the law of Hoffmann et al. 2022 gives {predicted:.2f} for web text, not for yours"
    )
    advice = ""
    if not passed:
        advice = "far above: run the checks of the model and of learning" if loss > high else "far below: easy text, or a leak"
    return Check(name, "run", passed, measured, "; ".join(filter(None, (expected, published))), advice,
                 "" if passed else "worse_than_known" if loss > high else "leak", {"predicted": predicted})  # fmt: skip


def _nearest(known: Sequence[Reference], weights: int, tokens: int) -> Reference | None:
    """The reference nearest in size, then in tokens; None where the run is too small, or has seen too little, for any."""
    fit = [r for r in known if weights >= SMALLEST_SHARE * r.weights and tokens >= r.curve[0][0]]
    return min(fit, key=lambda r: (abs(math.log(weights / r.weights)), abs(math.log(tokens / r.curve[-1][0]))), default=None)


def _loss_at(reference: Reference, tokens: int) -> float:
    """A reference's loss after so many tokens; after its end its last."""
    at, losses = zip(*reference.curve, strict=True)
    return float(np.interp(math.log(tokens), np.log(at), losses))


def _shown(reference: Reference) -> str:
    tokens, loss = reference.curve[-1]
    return f"{loss:.3f} after {tokens:,} tokens: {reference.name} ({reference.source})"
