"""What a model learns from: text, tokens, shards."""

from dataclasses import dataclass

from groundup.config.declaration import option


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
    source: tuple[str, ...] = option(
        (),
        "A source with a name and a weight, NAME=PATH:WEIGHT, instead of plain sources (repeatable): a share of WEIGHT of the "
        "training windows is from PATH, and each source is evaluated by itself.",
        why="ours: Hugging Face leaves it to interleave_datasets",
    )
    path_context: bool = option(
        False,
        "Begin each document with its path, after the token <|file_sep|>: for code, where a file's name says much.",
        why="ours: the format is Qwen2.5-Coder's",
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
class CodeOptions:
    """Code: learning to fill a hole."""

    fim_rate: float = option(
        0.0,
        "Share of the documents that are cut in three and put in an order in which the middle comes last; 0 is off. Such a "
        "model answers `groundup generate --prefix … --suffix …`.",
        at_least=0,
        at_most=1,
        why="ours: fill-in-the-middle, Bavarian et al. 2022",
    )
    fim_spm_rate: float = option(
        0.5,
        "Share of these that begin with the suffix (SPM); the others begin with the prefix (PSM).",
        at_least=0,
        at_most=1,
        why="ours, as fim_rate; half each is the paper's advice, section 4.3",
    )
