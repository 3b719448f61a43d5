"""One model, and ways to choose the next byte."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from groundup.lab.bench import Bench, rounded, validation_windows
from groundup.lab.experiment import Experiment, Measured, Options, Part, Results, against, is_lower, number, percent
from groundup.lab.pictures import dots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL = "real text"
GREEDY = "greedy"
TEMPERATURES = ("temperature 0.5", "temperature 0.8", "temperature 1", "temperature 1.5")
PLAIN = "temperature 1"
FILTERS = ("top-k 5", "top-k 20", "top-p 0.5", "top-p 0.9")
BEAMS = ("2 beams", "8 beams")
DECODERS: dict[str, dict[str, Any]] = {
    REAL: {"real": True},
    GREEDY: {"temperature": 0.0},
    **{setting: {"temperature": float(setting.split()[1])} for setting in TEMPERATURES},
    **{setting: {"top_k": int(setting.split()[1])} for setting in FILTERS[:2]},
    **{setting: {"top_p": float(setting.split()[1])} for setting in FILTERS[2:]},
    **{setting: {"beams": int(setting.split()[0])} for setting in BEAMS},
}
OWN = ("real", "temperature", "top_k", "top_p", "beams", "prompts", "prompt_tokens", "new_tokens")
"""Options that are not training's."""
REPEATED, DISTINCT = 12, 4
"""Bytes of a piece that is looked for earlier in its text, and of those that are counted."""


def measure(bench: Bench, options: Options, seed: int) -> Measured:
    """
    Write continuations of validation text with the seed's model, which is trained once for all settings.

    Returns:
        loss (of the written bytes in the model's own eyes, nats per byte), perplexity, repeated, distinct, model_loss.
    """
    own = {key: options[key] for key in OWN if key in options}
    training = {key: value for key, value in options.items() if key not in OWN}
    if seed not in bench.kept:
        bench.kept[seed] = _model_and_texts(bench, training, seed)
    model, end, texts, model_loss = bench.kept[seed]
    cut = own["prompt_tokens"]
    prompts = [text[:cut] for text in texts[: own["prompts"]]]
    real = [text[cut : cut + own["new_tokens"]] for text in texts[: own["prompts"]]]
    written = real if "real" in own else _written(model, prompts, own, end, seed)
    loss = _loss(model, prompts, written)
    return {
        "loss": rounded(loss),
        "perplexity": rounded(math.exp(min(loss, 50))),
        "repeated": rounded(repeated(zip(prompts, written, strict=True))),
        "distinct": rounded(distinct(written)),
        "model_loss": model_loss,
        "sample": bytes(id for id in written[0] if id < 256).decode(errors="replace"),
    }


def _model_and_texts(bench: Bench, options: Options, seed: int) -> tuple[Any, int, list[list[int]], float | None]:
    """A trained model, the end-of-text id, windows of validation text, and the model's loss on them."""
    with bench.training(options, seed) as training:
        for _ in training:
            pass
        found = training.evaluate()
        texts = validation_windows(training, 16).tolist()
        return training.model.eval(), training.tokenizer.end_of_text_id, texts, rounded(found.loss) if found else None


def _written(model: Any, prompts: list[list[int]], own: Options, end: int, seed: int) -> list[list[int]]:
    """A continuation of each prompt."""
    from groundup.generation.beam_search import beam_search
    from groundup.generation.generate import generate_tokens
    from groundup.generation.sampling import Sampler

    longest = own["new_tokens"]
    if "beams" in own:
        found = (beam_search(model, p, num_beams=own["beams"], max_new_tokens=longest, end_of_text_id=end) for p in prompts)
        return [hypotheses[0].tokens for hypotheses in found]
    sampler = Sampler(own.get("temperature", 1.0), own.get("top_k", 0), own.get("top_p", 1.0))
    seeds = [seed * 1000 + number for number in range(len(prompts))]
    written: list[list[int]] = [[] for _ in prompts]
    drawn = generate_tokens(model, prompts, sampler, seeds=seeds, max_new_tokens=longest, end_of_text_id=end)
    for choice in drawn:
        written[choice.prompt].append(choice.token)
    return written


def _loss(model: Any, prompts: Sequence[list[int]], written: Sequence[list[int]]) -> float:
    """Mean negative log-probability of the written tokens, given all before, nats per token."""
    import torch

    total, count = 0.0, 0
    for prompt, text in zip(prompts, written, strict=True):
        ids = torch.tensor([[*prompt, *text]])
        with torch.no_grad():
            logprobs = model.logits(model(ids[:, :-1])).log_softmax(-1)[0]
        chosen = logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
        total -= float(chosen.double().sum())
        count += len(text)
    return total / count


def repeated(texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Share of the pieces of ``REPEATED`` tokens in what was written that are in the same text before."""
    seen, again = 0, 0
    for prompt, written in texts:
        text = [*prompt, *written]
        pieces = [tuple(text[i : i + REPEATED]) for i in range(len(text) - REPEATED + 1)]
        for i in range(len(prompt), len(pieces)):
            seen += 1
            again += pieces[i] in pieces[:i]
    return again / max(1, seen)


def distinct(texts: Sequence[Sequence[int]]) -> float:
    """Distinct-n: different pieces of ``DISTINCT`` tokens, as a share of all pieces in all texts. Li et al. 2016."""
    pieces = [tuple(text[i : i + DISTINCT]) for text in texts for i in range(len(text) - DISTINCT + 1)]
    return len(set(pieces)) / max(1, len(pieces))


def says(results: Results) -> list[Part]:
    """Greedy and beams against plain sampling, and both against real text."""
    loss = {setting: results.spread(setting, "loss") for setting in results.settings}
    again = {setting: results.spread(setting, "repeated") for setting in results.settings}
    variety = {setting: results.spread(setting, "distinct") for setting in results.settings}
    order = [loss[setting].mean for setting in (GREEDY, *TEMPERATURES)]
    rises = all(a < b for a, b in zip(order, order[1:], strict=False))
    between = [setting for setting in FILTERS if loss[GREEDY].mean < loss[setting].mean < loss[PLAIN].mean]
    most = BEAMS[-1]
    nearest = min((s for s in results.settings if s != REAL), key=lambda s: abs(loss[s].mean - loss[REAL].mean))
    return [
        Part(
            f"Real text costs the model {loss[REAL]} nats per byte, a perplexity of "
            f"{number(results.spread(REAL, 'perplexity').mean)}, and {percent(again[REAL])} of its pieces of {REPEATED} bytes "
            "are repeated."
        ),
        Part(
            f"Greedy text costs {loss[GREEDY]} and repeats {percent(again[GREEDY])}; plain sampling costs {loss[PLAIN]} and "
            f"repeats {percent(again[PLAIN])}.",
            is_lower(again[PLAIN], again[GREEDY]),
        ),
        Part(
            "From greedy to temperature 1.5 the cost "
            + ("rises at every step" if rises else "does not rise at every step")
            + f", to {loss[TEMPERATURES[-1]]}.",
            rises,
        ),
        Part(
            (
                f"{', '.join(between)} lie"
                if len(between) > 1
                else f"{between[0]} lies"
                if between
                else "None of top-k and top-p lies"
            )
            + " between greedy and plain sampling in cost.",
            len(between) == len(FILTERS),
        ),
        Part(
            f"{most} cost {loss[most]} (than greedy {against(loss[most], loss[GREEDY])}), and repeat {percent(again[most])}.",
            is_lower(loss[most], loss[PLAIN]) and is_lower(again[PLAIN], again[most]),
        ),
        Part(
            f"Nearest to real text in cost is {nearest}; of different pieces of {DISTINCT} bytes it has "
            f"{percent(variety[nearest])}, real text {percent(variety[REAL])}, greedy {percent(variety[GREEDY])}."
        ),
    ]


def draw(results: Results, figure: "Figure") -> None:
    """Cost, repetition and variety of each setting."""
    for axes, key, label in zip(
        figure.subplots(1, 3, sharey=True),
        ("loss", "repeated", "distinct"),
        ("cost to the model (nats per byte)", f"repeated pieces of {REPEATED} bytes", f"distinct pieces of {DISTINCT} bytes"),
        strict=True,
    ):
        dots(axes, {setting: results.spread(setting, key) for setting in results.settings}, digits=2)
        axes.axhline(0.5, color="black", linewidth=0.6)
        axes.set(xlabel=label)


EXPERIMENT = Experiment(
    name="decoding",
    claim="The likelier the text that decoding looks for, the more it repeats itself; sampling is varied, and costs more.",
    formula="Draw from softmax(z / t), of the k likeliest (top-k) or of the fewest that hold a share p (top-p); beams look for "
    "the text with the highest Σ log p. Holtzman et al. 2020.",
    set_up="2 layers, 64 wide, context 128, 500 steps of 1,024 bytes, one model a seed; 8 continuations of 96 bytes after 32 "
    "bytes of validation text each. Cost is the model's own loss on what was written.",
    settings=DECODERS,
    base={
        "n_positions": 128, "max_steps": 500, "total_batch_tokens": 1024, "learning_rate": 5e-3, "prompts": 8,
        "prompt_tokens": 32, "new_tokens": 96,
    },
    measure=measure,
    says=says,
    draw=draw,
)  # fmt: skip
