"""Rules across options: what cannot be asked for together."""

from collections.abc import Mapping
from typing import Any

from groundup.config.declaration import AUTO
from groundup.config.ramp import ends

FIGURES = ("loss", "perplexity", "bits_per_byte", "token_accuracy")
"""What an evaluation measures; of a source with its name before, of the averaged weights with ema."""


def contradictions(values: Mapping[str, Any], origins: Mapping[str, str], *, shape_known: bool = True) -> list[str]:
    """Rules across options. Returns one line per broken rule."""
    problems = []
    if "n_embd" in values and shape_known:
        problems += _shape_contradictions(values, origins)
    if "total_batch_tokens" in values:
        problems += _batch_contradictions(values, origins, shape_known=shape_known)
        problems += _training_contradictions(values, origins)
        problems += _schedule_contradictions(values, origins)
    return problems + _decoding_contradictions(values, origins)


def _shape_contradictions(values: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Rules across the options of a model's shape."""
    problems = []
    if values["n_embd"] % values["n_head"]:
        width, heads = values["n_embd"], values["n_head"]
        nearest = max(1, round(width / heads)) * heads
        problems.append(
            f"n_embd: {width} (from {origins['n_embd']}) is not divisible by n_head {heads} "
            f"(from {origins['n_head']}); the nearest width that is: {nearest}"
        )
    if values["stride"] > values["n_positions"]:
        problems.append(
            f"stride: {values['stride']} (from {origins['stride']}) is more than n_positions {values['n_positions']} "
            f"(from {origins['n_positions']}), so text between windows would be lost; give at most that"
        )
    lengths = ends(values["sequence_length"]) if values["sequence_length"] else ()
    if uneven := [length for length in lengths if length < 1 or values["n_positions"] % length]:
        problems.append(
            f"sequence_length: {uneven[0]} (from {origins['sequence_length']}) does not divide n_positions "
            f"{values['n_positions']} (from {origins['n_positions']}); give a divisor of it"
        )
    return problems


def _batch_contradictions(values: Mapping[str, Any], origins: Mapping[str, str], *, shape_known: bool) -> list[str]:
    """Rules across the options of a batch."""
    problems = []
    total, origin = values["total_batch_tokens"], origins["total_batch_tokens"]
    passes, passes_origin = values["gradient_accumulation_steps"], origins["gradient_accumulation_steps"]
    if passes and "default" not in (origin, passes_origin):
        # A resolved configuration file holds both, but no ramp; there the accumulation wins, as when it was resolved.
        both_in_file = origin.startswith("file ") and origin == passes_origin and isinstance(total, int)
        if not origin.startswith(("preset", "fine-tuning")) and not both_in_file:
            problems.append(
                f"total_batch_tokens: {total} (from {origin}) and gradient_accumulation_steps {passes} both set the global "
                "batch; give one of them"
            )
    if passes and values["per_device_train_batch_size"] == AUTO:
        problems.append(
            f"gradient_accumulation_steps: {passes} (from {passes_origin}) times a pass that is found by itself "
            f"(per_device_train_batch_size auto, from {origins['per_device_train_batch_size']}) is no global batch; give "
            "total_batch_tokens instead"
        )
    if shape_known and not passes:
        window = values["n_positions"]
        if min(ends(total)) < window:
            problems.append(
                f"total_batch_tokens: {total} (from {origin}) is less than one window of "
                f"n_positions {window} (from {origins['n_positions']}); give at least {window}"
            )
    return problems


def _training_contradictions(values: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Rules across the options of a run."""
    problems = []

    def refuse(name: str, reason: str) -> None:
        problems.append(f"{name}: {values[name]} (from {origins[name]}) {reason}")

    if values["fp16"] and values["bf16"]:
        refuse("fp16", f"and bf16 (from {origins['bf16']}) are two precisions; give one of them")
    if values["max_steps"] and values["max_train_tokens"]:
        refuse("max_train_tokens", f"and max_steps {values['max_steps']} (from {origins['max_steps']}) both set the length; "
               "give one of them")  # fmt: skip
    if values["weight_decay_type"] == "coupled" and values["optim"] in ("adafactor", "muon"):
        refuse(
            "weight_decay_type", f"is for adamw_torch_fused, adamw_torch and sgd; {values['optim']} has decoupled decay only"
        )
    if values["load_best_model_at_end"]:
        evaluated, saved = values["eval_steps"], values["save_steps"]
        if not evaluated or not saved or saved % evaluated:
            refuse(
                "load_best_model_at_end",
                f"needs every saved step to be evaluated: save_steps {saved} (from {origins['save_steps']}) must be a multiple "
                f"of eval_steps {evaluated} (from {origins['eval_steps']})",
            )
    if values["early_stopping_patience"] and not values["eval_steps"]:
        refuse(
            "early_stopping_patience", f"waits for evaluations, but eval_steps is 0 (from {origins['eval_steps']}); raise it"
        )
    metric = values["metric_for_best_model"].removeprefix("eval_")
    figure = next((name for name in FIGURES if metric == name or metric.endswith(f"_{name}")), "")
    # Which sources a run has is known once its data is open; then their names are asked.
    if not figure or (metric == f"ema_{figure}" and not values["ema_decay"]):
        refuse("metric_for_best_model", f"is not measured in this run; it measures {', '.join(FIGURES)}")
    if values["init"] != "gpt2" and values["init_from"]:
        refuse("init", f"draws random weights, but those of init_from {values['init_from']} are given; leave one of them out")
    if values["fim_rate"] and values["sequence_length"]:
        refuse("fim_rate", f"needs whole windows: sequence_length {values['sequence_length']} (from "
               f"{origins['sequence_length']}) would cut a hole from its text; give one of them")  # fmt: skip
    if values["norm"] == "batch" and min(values["n_positions"], *ends(values["sequence_length"] or values["n_positions"])) == 1:
        refuse("norm", "needs more than one position in a pass; give a larger n_positions, or another norm")
    if values["norm"] == "batch" and values["torch_compile"] and values["activation_checkpointing"]:
        refuse("activation_checkpointing", "cannot be compiled with norm batch; leave it out, or --torch-compile")
    if values["spike_action"] != "report" and not values["spike_threshold"]:
        refuse("spike_action", f"never acts, because spike_threshold is 0 (from {origins['spike_threshold']}); raise it")
    if values["spike_action"] == "rollback" and not values["save_steps"]:
        refuse("spike_action", f"needs checkpoints to go back to, but save_steps is 0 (from {origins['save_steps']}); raise it")
    return problems


def _schedule_contradictions(values: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Options that only some schedules read, given to another."""
    kind = values["lr_scheduler_type"]
    readers = {
        "inverse_sqrt_scale": ("inverse_sqrt",),
        "lr_power": ("polynomial",),
        "num_decay_steps": ("warmup_stable_decay",),
        "lr_decay_type": ("warmup_stable_decay",),
        "min_lr_rate": ("cosine_with_min_lr", "polynomial", "warmup_stable_decay"),
    }
    if kind == "constant":
        readers["warmup_steps"] = ("constant_with_warmup",)
    if values["inverse_sqrt_scale"] and _by_hand(origins["learning_rate"]):
        return [
            f"inverse_sqrt_scale: {values['inverse_sqrt_scale']} (from {origins['inverse_sqrt_scale']}) and learning_rate "
            f"{values['learning_rate']} (from {origins['learning_rate']}) both set the rate; give one of them"
        ]
    return [
        f"{name}: {values[name]} (from {origins[name]}) has no effect on lr_scheduler_type {kind} (from "
        f"{origins['lr_scheduler_type']}); it acts on {', '.join(kinds)}"
        for name, kinds in readers.items()
        if kind not in kinds and _by_hand(origins[name])
    ]


def _by_hand(origin: str) -> bool:
    """Whether somebody gave a value just now, not a file, in which every option stands."""
    return origin.startswith(("-", "argument"))


def _decoding_contradictions(values: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Rules across the options of generate."""
    beams, problems = values.get("num_beams", 1), []
    if beams > 1:
        sampling = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}
        given = [name for name, off in sampling.items() if origins[name] != "default" and values[name] != off]
        problems += [
            f"{name}: {values[name]} (from {origins[name]}) samples, num_beams {beams} (from {origins['num_beams']}) searches "
            "for the likeliest text; give one of them"
            for name in given
        ]
        if values["num_return_sequences"] > beams:
            problems.append(
                f"num_return_sequences: {values['num_return_sequences']} (from {origins['num_return_sequences']}) is more than "
                f"the num_beams {beams} (from {origins['num_beams']}); give at most that, or more beams"
            )
    elif "num_beams" in values:
        given = [name for name, off in (("length_penalty", 1), ("early_stopping", "false")) if values[name] != off]
        problems += [
            f"{name}: {values[name]!r} (from {origins[name]}) acts on beams only; add --num-beams, or leave it out"
            for name in given
        ]
        if values["temperature"] == 0 and values["num_return_sequences"] > 1:
            problems.append(
                f"num_return_sequences: {values['num_return_sequences']} (from {origins['num_return_sequences']}), but "
                f"temperature 0 (from {origins['temperature']}) gives one text; raise it, or add --num-beams for the n best"
            )
    if values.get("prompt") and (values.get("prefix") or values.get("suffix")):
        problems.append(
            f"prompt: {values['prompt'][0]!r} (from {origins['prompt']}) is continued at its end, --prefix and --suffix are "
            "text around a hole; give one or the other"
        )
    if "" in values.get("stop_strings", ()):
        problems.append(f"stop_strings: '' (from {origins['stop_strings']}) is in every text; give at least one character")
    return problems
