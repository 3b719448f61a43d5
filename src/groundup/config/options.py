"""
Every option of groundup, declared once.

Each group is a frozen dataclass; the field's name is the flag's name, the key in a config file and the argument in
Python. Names and defaults are those of Hugging Face's ``TrainingArguments``, ``GPT2Config`` and ``GenerationConfig``
where they have one; where a name is ours or a default differs, ``why`` says so.
"""

from dataclasses import dataclass

from groundup.config.declaration import option

AUTO = "auto"


# fmt: off  (an option is read as a paragraph, not as a column)
@dataclass(frozen=True)
class DataOptions:
    """Data: how sources become shards."""

    validation_fraction: float = option(
        0.1,
        "Share of the documents kept for validation, chosen by a keyed hash of their content; of a source that "
        "is one document, its end.",
        at_least=0,
        below=1,
        why="ours: pre-training data has no ready-made split",
    )
    validation_source: tuple[str, ...] = option(
        (),
        "Validation text from these sources instead of a share of the others (repeatable).",
        why="ours, like validation_fraction",
    )
    text_column: str = option(
        "text",
        "Column that holds the text in .jsonl, .csv and .parquet.",
        why="ours: the name is that of Hugging Face's example scripts",
    )
    encoding_errors: str = option(
        "replace",
        "Invalid UTF-8: replace it by U+FFFD and count it, or stop.",
        choices=("replace", "strict"),
        why="ours: Python's own word",
    )
    shard_tokens: int = option(2**20, "Size of a shard.", unit="tokens", at_least=1, why="ours: a shard is our format")
    workers: int = option(
        0,
        "Processes that tokenize; 0 is one per core. The result is the same for any number.",
        unit="processes",
        at_least=0,
        why="ours: preparation is ours",
    )


@dataclass(frozen=True)
class TokenizerOptions:
    """Tokenizer: how text becomes token ids."""

    tokenizer: str = option(
        "bpe",
        "bpe (trained on the corpus), byte, gpt2 (OpenAI's), or the path of a tokenizer.json or of a folder "
        "that holds one, or GPT-2's two files.",
        why="ours: Hugging Face's Trainer is handed a tokenizer object",
    )
    vocab_size: int = option(
        8192,
        "Vocabulary to train with bpe: 256 bytes + merges + end-of-text.",
        unit="tokens",
        at_least=257,
        why="GPT2Config's 50257 suits 8 million web pages; a small corpus cannot fill it",
    )
    tokenizer_train_bytes: int = option(
        2**27,
        "Train bpe on at most this much text, sampled evenly by a hash.",
        unit="bytes",
        at_least=1,
        why="ours: keeps memory bounded",
    )


@dataclass(frozen=True)
class ModelOptions:
    """Model: the shape of the GPT-2."""

    model: str = option(
        "gpt2-micro",
        "Preset that sets the shape, the global batch and the learning rate, each of which can be overridden: gpt2, "
        "gpt2-medium, gpt2-large, gpt2-xl; for laptops gpt2-mini, gpt2-micro, gpt2-nano.",
        why="ours: a name for a set of defaults",
    )
    n_layer: int = option(12, "Transformer blocks.", at_least=1)
    n_head: int = option(12, "Attention heads; they divide n_embd.", at_least=1)
    n_embd: int = option(768, "Width of the embeddings and of the residual stream.", at_least=1)
    n_inner: int = option(0, "Width inside the MLP; 0 is 4 × n_embd.", at_least=0, why="GPT2Config spells 'four times' as None")
    n_positions: int = option(1024, "Context length.", unit="tokens", at_least=1)
    resid_pdrop: float = option(
        0.0,
        "Dropout on the residual branches.",
        at_least=0,
        below=1,
        why="pre-training sees most tokens once, where dropout only costs; GPT-2 had 0.1",
    )
    embd_pdrop: float = option(0.0, "Dropout on the embeddings.", at_least=0, below=1, why="as resid_pdrop")
    attn_pdrop: float = option(0.0, "Dropout on the attention weights.", at_least=0, below=1, why="as resid_pdrop")
    activation_function: str = option(
        "gelu_new", "GELU in the MLP: gelu_new, its tanh form, as GPT-2; or gelu, exact.", choices=("gelu_new", "gelu")
    )
    layer_norm_epsilon: float = option(1e-5, "Epsilon in the layer norms.", above=0)
    initializer_range: float = option(0.02, "Standard deviation of the initial weights.", at_least=0)
    tie_word_embeddings: bool = option(True, "Use the token embedding as the head, as GPT-2 does.")


@dataclass(frozen=True)
class InitialWeightsOptions:
    """Initial weights: somebody's, or random ones."""

    init_from: str = option(
        "",
        "Start from these weights instead of random ones: a run, a checkpoint, or whatever `groundup import` reads. Shape and "
        "tokenizer are theirs; n_positions may be another: positions are cut off, or added as copies of the first.",
        why="ours: the word is nanoGPT's",
    )
    freeze: tuple[str, ...] = option(
        (),
        "Leave parameters with such names as they are, e.g. 'wte*' or 'h.[0-5].*' (repeatable).",
        why="ours: Hugging Face leaves it to a loop in Python",
    )


@dataclass(frozen=True)
class BatchOptions:
    """Batches: how many tokens a step sees."""

    total_batch_tokens: int = option(
        2**19,
        "Global batch of one optimizer step, rounded down to whole windows; accumulation follows from it.",
        unit="tokens",
        at_least=1,
        why="ours: the number that matters, whatever the device holds",
    )
    per_device_train_batch_size: int = option(8, "Windows in one forward and backward pass.", unit="windows", at_least=1)
    gradient_accumulation_steps: int = option(
        0,
        "Passes per step; 0 computes it from total_batch_tokens. When given, the global batch follows from it.",
        unit="micro-batches",
        at_least=0,
        why="computed, so that the global batch is what was asked for",
    )
    per_device_eval_batch_size: int = option(8, "Windows in one pass of an evaluation.", unit="windows", at_least=1)
    stride: int = option(
        0,
        "Distance between the starts of two windows; 0 is n_positions (no overlap), less overlaps them.",
        unit="tokens",
        at_least=0,
        why="ours: Hugging Face's scripts cut blocks without overlap",
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer: AdamW and its learning rate."""

    learning_rate: float = option(
        6e-4,
        "Peak learning rate.",
        at_least=0,
        why="5e-5 is for fine-tuning; this is GPT-3's for 125M, Brown et al. 2020, table 2.1",
    )
    lr_scheduler_type: str = option(
        "cosine_with_min_lr",
        "Shape of the schedule after warmup.",
        choices=("cosine_with_min_lr", "cosine", "linear", "constant_with_warmup"),
        why="GPT-3 decays by a cosine to a tenth; Hugging Face's linear is for fine-tuning",
    )
    warmup_steps: float = option(
        0.05,
        "Linear warmup: steps, or below 1 a fraction of the run.",
        unit="steps",
        at_least=0,
        why="training from random weights without warmup is fragile",
    )
    min_lr_rate: float = option(
        0.1,
        "Floor of cosine_with_min_lr, as a fraction of learning_rate.",
        at_least=0,
        at_most=1,
        why="ours as an option: Hugging Face hides it in lr_scheduler_kwargs",
    )
    weight_decay: float = option(
        0.1,
        "Decoupled weight decay, on matrices only.",
        at_least=0,
        why="GPT-3, appendix B; Hugging Face's 0 is for fine-tuning",
    )
    adam_beta1: float = option(0.9, "AdamW's beta1.", at_least=0, below=1)
    adam_beta2: float = option(0.95, "AdamW's beta2.", at_least=0, below=1, why="GPT-3, appendix B")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", at_least=0)
    max_grad_norm: float = option(1.0, "Clip the gradient to this global norm; 0 is off.", at_least=0)


@dataclass(frozen=True)
class RunOptions:
    """Run: how long, and when to log, evaluate and save."""

    max_steps: int = option(
        0, "Steps to train; 0 follows num_train_epochs.", unit="steps", at_least=0, why="Hugging Face spells 'off' as -1"
    )
    num_train_epochs: float = option(3.0, "Passes over the training windows, where max_steps is 0.", unit="epochs", above=0)
    logging_steps: int = option(10, "Log every so many steps.", unit="steps", at_least=1, why="500 shows a small run nothing")
    eval_steps: int = option(
        250,
        "Evaluate every so many steps, before the first and after the last; 0 is never.",
        unit="steps",
        at_least=0,
        why="a curve needs points from the start",
    )
    max_eval_tokens: int = option(
        2**20,
        "Validation tokens of one evaluation during training, spread evenly; 0 is all of them.",
        unit="tokens",
        at_least=0,
        why="ours: ten gigabytes of validation text would stop the run for hours",
    )
    save_steps: int = option(
        250,
        "Save a checkpoint every so many steps and after the last; 0 is only the last.",
        unit="steps",
        at_least=0,
        why="less work to lose",
    )
    save_total_limit: int = option(
        2, "Checkpoints to keep; 0 keeps all.", at_least=0, why="a full disk ends more runs than a missing old checkpoint"
    )
    sample_prompt: str = option(
        "",
        "Prompt of the sample written at each evaluation; empty starts a new document.",
        why="ours: samples show what a loss cannot",
    )
    sample_tokens: int = option(64, "Length of that sample; 0 writes none.", unit="tokens", at_least=0, why="ours")
    max_skipped_steps: int = option(
        10,
        "Stop with exit code 5 after so many steps in a row whose loss or gradient is not finite.",
        unit="steps",
        at_least=1,
        why="ours: a step that is not finite is skipped, and counted",
    )
    seed: int = option(42, "Seed of the weights, the data order and the dropout.", at_least=0)


@dataclass(frozen=True)
class MachineOptions:
    """Machine: where and in what precision to compute."""

    device: str = option(
        AUTO,
        "cuda, mps or cpu; auto takes the first that is there.",
        choices=(AUTO, "cuda", "mps", "cpu"),
        why="ours: Hugging Face has use_cpu",
    )
    bf16: bool | None = option(
        None,
        "bfloat16: in training by autocast, by default where the hardware multiplies it faster; in generation as the type of "
        "the weights, by default not.",
        why="False leaves half of the speed unused",
    )


@dataclass(frozen=True)
class SpeedOptions:
    """Speed: how the training step is run, and measured."""

    torch_compile: bool = option(False, "Compile the model with torch.compile.")
    peak_tflops: float = option(
        0.0,
        "Peak of the device for MFU; 0 is the data sheet's or, where unknown, measured.",
        unit="TFLOP/s",
        at_least=0,
        why="ours: MFU needs it",
    )


@dataclass(frozen=True)
class GenerationOptions:
    """Generation: how the next token is chosen."""

    prompt: tuple[str, ...] = option((), "Text to continue (repeatable).", why="ours")
    prompt_file: tuple[str, ...] = option(
        (), "Text to continue, from a file; - is standard input (repeatable).", why="ours: a long prompt fits no command line"
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


# fmt: on

PREPARE_GROUPS = (DataOptions, TokenizerOptions)
TRAIN_GROUPS = (
    DataOptions,
    TokenizerOptions,
    ModelOptions,
    InitialWeightsOptions,
    BatchOptions,
    OptimizerOptions,
    RunOptions,
    MachineOptions,
    SpeedOptions,
)
EVALUATE_GROUPS = (EvaluationOptions, MachineOptions)
GENERATE_GROUPS = (GenerationOptions, MachineOptions)
SCORE_GROUPS = (ScoreOptions, MachineOptions)
IMPORT_GROUPS = (ImportOptions,)
EXPORT_GROUPS = (ExportOptions,)

COMMANDS = {
    "prepare": PREPARE_GROUPS,
    "train": TRAIN_GROUPS,
    "evaluate": EVALUATE_GROUPS,
    "generate": GENERATE_GROUPS,
    "score": SCORE_GROUPS,
    "import": IMPORT_GROUPS,
    "export": EXPORT_GROUPS,
}
