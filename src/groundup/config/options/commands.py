"""What the other commands do with a model."""

from dataclasses import dataclass

from groundup.config.declaration import option


# fmt: off  (an option is read as a paragraph, not as a column)
@dataclass(frozen=True)
class GenerationOptions:
    """Generation: how the next token is chosen."""

    prompt: tuple[str, ...] = option((), "Text to continue (repeatable).", why="ours")
    prompt_file: tuple[str, ...] = option(
        (), "Text to continue, from a file; - is standard input (repeatable).", why="ours: a long prompt fits no command line"
    )
    prefix: str = option(
        "", "Fill the hole between this text and --suffix, with a model that was trained with fim_rate.", why="ours"
    )
    suffix: str = option("", "The text after the hole.", why="ours")
    fim_order: str = option(
        "spm",
        "Show the model what is after the hole first (spm), or what is before it (psm: for a model trained with "
        "--fim-spm-rate 0).",
        choices=("spm", "psm"),
        why="ours: small models fill far better where the prefix is right before the hole (docs/log.md)",
    )
    max_new_tokens: int = option(
        128, "Tokens to generate at most.", unit="tokens", at_least=1, why="Hugging Face's 20 is half a sentence"
    )
    temperature: float = option(
        0.8, "Divide the logits by it; 0 always takes the most likely token.", at_least=0, why="small models ramble at 1.0"
    )
    top_k: int = option(50, "Sample from the k most likely tokens; 0 is off.", at_least=0)
    top_p: float = option(1.0, "Sample from the fewest tokens whose probability reaches p; 1 is off.", above=0, at_most=1)
    min_p: float = option(
        0.0,
        "Sample from the tokens at least this many times as likely as the likeliest; 0 is off.",
        at_least=0,
        at_most=1,
        why="Hugging Face spells 'off' as None",
    )
    repetition_penalty: float = option(
        1.0, "Divide the score of tokens that are there already, or multiply it where negative; 1 is off.", above=0
    )
    num_beams: int = option(1, "Beam search with so many beams instead of sampling; 1 is off.", unit="beams", at_least=1)
    length_penalty: float = option(
        1.0,
        "Beams: divide the summed log-probability by length to this power; above 0 favours longer text.",
        at_least=-10,
        at_most=10,
    )
    early_stopping: str = option(
        "false",
        "Beams: stop once num_beams have ended (true), once no better one is likely (false), once none is possible (never).",
        choices=("true", "false", "never"),
        why="Hugging Face's False and True as words, because never is one",
    )
    num_return_sequences: int = option(
        1, "Completions of each prompt; with beams the best ones, at most num_beams.", at_least=1, at_most=100_000
    )
    stop_strings: tuple[str, ...] = option(
        (), "End the text before this string (repeatable).", why="Hugging Face leaves it in the text; servers do not"
    )
    top_logprobs: int = option(
        5,
        "Likeliest tokens that --json reports at each place, with their log-probabilities.",
        unit="tokens",
        at_least=0,
        why="ours: the name is that of OpenAI's API",
    )
    batch_size: int = option(
        8, "Completions written at the same time.", at_least=1, why="ours: the name of pipelines' argument"
    )
    seed: int = option(42, "Seed of the draws.", at_least=0)


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation: what to measure on."""

    data: str = option(
        "", "Dataset folder, or a text source; by default the validation split of the run's dataset.", why="ours"
    )
    per_device_eval_batch_size: int = option(8, "Windows in one pass of an evaluation.", unit="windows", at_least=1)
    n_positions: int = option(
        0, "Context length to evaluate with; 0 is the model's.", unit="tokens", at_least=0, why="the model knows its own"
    )


@dataclass(frozen=True)
class ScoreOptions:
    """Scoring: which text to look at."""

    text: tuple[str, ...] = option((), "Text to score (repeatable).", why="ours")
    text_file: tuple[str, ...] = option((), "Text to score, from a file; - is standard input (repeatable).", why="ours")
    top_logprobs: int = option(
        5,
        "Likeliest tokens that --json reports at each place, with their log-probabilities.",
        unit="tokens",
        at_least=0,
        why="ours: the name is that of OpenAI's API",
    )


@dataclass(frozen=True)
class ImportOptions:
    """Import: what the files do not say."""

    tokenizer: str = option(
        "",
        "The tokenizer that the model was trained with, where its files hold none: gpt2, or the path of a tokenizer.json or "
        "of a folder that holds one.",
        why="ours: a state dict has no tokenizer",
    )
    n_head: int = option(
        0, "Attention heads, where the files do not say how many; 0 takes what they say.", at_least=0, why="files say it"
    )
    mirror: tuple[str, ...] = option(
        (),
        "Download OpenAI's files from this address instead, e.g. https://host/gpt-2/models/{size}/ (repeatable).",
        why="ours",
    )


@dataclass(frozen=True)
class ExportOptions:
    """Export: in which form."""

    format: str = option(
        "hf",
        "hf (a folder for transformers), gguf (a file for llama.cpp), or openai-state-dict (a folder as OpenAI released "
        "GPT-2: a TensorFlow checkpoint without its graph).",
        choices=("hf", "gguf", "openai-state-dict"),
        why="ours",
    )
    dtype: str = option(
        "f32",
        "Type of the weights: f32, f16, bf16; for gguf also q8_0. Always computed from float32.",
        choices=("f32", "f16", "bf16", "q8_0"),
        why="ours: the names are GGUF's",
    )


@dataclass(frozen=True)
class DrawingOptions:
    """Drawing: how far, and where to."""

    max_steps: int = option(1000, "Steps to draw.", unit="steps", at_least=1, why="a picture needs an end")
    output: str = option("schedule.png", "The picture.", why="ours")


@dataclass(frozen=True)
class WeightsOptions:
    """Weights: which of a checkpoint's."""

    weights: str = option(
        "trained",
        "The trained weights, or ema: their moving average, where the run kept one (ema_decay).",
        choices=("trained", "ema"),
        why="ours",
    )


@dataclass(frozen=True)
class DoctorOptions:
    """Examination: what is looked at, and how long."""

    checks: tuple[str, ...] = option(
        (),
        "Do these checks alone, by name or by group (repeatable): machine, data, model, gradients, learning, equivalence, run.",
        why="ours",
    )
    verify_resume: bool = option(
        False, "Also train a few steps, stop, go on, and compare with training that was not stopped.", why="ours"
    )
    picture: str = option("", "Draw the learning-rate range test into this .png.", why="ours")


@dataclass(frozen=True)
class WatchOptions:
    """Watching: where the page is."""

    port: int = option(8265, "Port on 127.0.0.1; 0 takes a free one.", at_least=0, at_most=65535, why="ours")
    threads: int = option(
        1,
        "Threads of the token view; more are faster, and take them from a training that goes on.",
        unit="threads",
        at_least=1,
        at_most=1024,
        why="ours",
    )


@dataclass(frozen=True)
class ReportOptions:
    """Report: where to."""

    output: str = option(
        "",
        "The page, a .html; by default report.html in the run, or in the current folder where there are several.",
        why="ours",
    )


@dataclass(frozen=True)
class LabOptions:
    """Lab: how often an experiment is repeated."""

    seeds: int = option(
        3,
        "Runs of each setting, with other random weights and another order; fewer than 2 show no spread.",
        at_least=1,
        why="ours",
    )
