"""What differs between runs: what they were told, and what came of it."""

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = list[dict[str, Any]]


def differences(runs: Sequence[Mapping[str, Any]]) -> dict[str, ROWS]:
    """
    Two tables, each row a name and a value for each run; None where a run has none.

    Args:
        runs: as ``run_data`` makes them.

    Returns:
        config: the options that are not the same in all; results: the figures of each, the best one's ``best``.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run["config"]))
    # An option that is not there, and one that is empty, are the same.
    empty: tuple[Any, ...] = ("", [])
    told = [{key: None if value in empty else value for key, value in run["config"].items()} for run in runs]
    config = [_row(key, [options.get(key) for options in told]) for key in keys]
    changed = [row for row in config if any(value != row["values"][0] for value in row["values"])]
    return {"config": changed, "results": _results(runs)}


def verdict(runs: Sequence[Mapping[str, Any]]) -> str:
    """
    Which run is the best, in words; by bits per byte, which runs with different tokenizers have in common.

    Args:
        runs: as ``run_data`` makes them, with their ``label``.
    """
    found = [(run["totals"]["best_evaluation"] or {}).get("bits_per_byte") for run in runs]
    there = sorted((bits, run["label"]) for bits, run in zip(found, runs, strict=True) if bits is not None)
    if len(there) < 2:
        return "Fewer than two of these runs were evaluated, so none is called the best: set --eval-steps."
    (best, name), *others = there
    text = (
        f"Best: {name}, with {best:.3f} bits per byte on validation; "
        + ", ".join(f"{n} {bits:.3f}" for bits, n in others)
        + "."
    )
    texts = {str(run["data"].get("splits", {}).get("validation", {}).get("bytes")) for run in runs}
    return text + (" Their validation texts are not the same, so this may be the text's doing." if len(texts) > 1 else "")


def _results(runs: Sequence[Mapping[str, Any]]) -> ROWS:
    totals = [run["totals"] for run in runs]
    # A loss is one of tokens: with another vocabulary it is another quantity.
    lowest = min if len({run["data"].get("vocab_size") for run in runs}) == 1 else None
    best = [one["best_evaluation"] or {} for one in totals]
    return [
        _row("steps", [one["step"] for one in totals]),
        _row("tokens", [one["tokens"] for one in totals]),
        _row("seconds of training", [one["seconds"] for one in totals]),
        _row("tokens per second", [one["tokens_per_second"] for one in totals], max),
        _row("training loss at the end", [one["loss"] for one in totals], lowest),
        _row("best validation loss", [one.get("loss") for one in best], lowest),
        _row("… at step", [one.get("step") for one in best]),
        _row("… perplexity", [one.get("perplexity") for one in best], lowest),
        _row("… bits per byte", [one.get("bits_per_byte") for one in best], min),
        _row("overfitting from step", [(one["overfitting"] or {}).get("step") for one in totals]),
        _row("skipped steps", [one["skipped"] for one in totals]),
        _row("spikes", [one["spikes"] for one in totals]),
    ]


def _row(name: str, values: Sequence[Any], choose: Any = None) -> dict[str, Any]:
    """A row; ``best`` is the place of the value that ``choose`` takes, where there is a choice."""
    there = [value for value in values if value is not None]
    best = values.index(choose(there)) if choose and len(set(there)) > 1 else None
    return {"name": name, "values": list(values), "best": best}
