"""
The folders in which OpenAI released GPT-2, and in which fine-tuners of its code keep theirs.

    checkpoint                       which of the files is meant: a line of TensorFlow's text format
    hparams.json                     n_vocab n_ctx n_embd n_head n_layer
    encoder.json, vocab.bpe          the tokenizer: ids of tokens; merges
    model.ckpt.index, model.ckpt.data-00000-of-00001      the weights (interop/tensor_bundle.py)

The weights' names are those of https://github.com/openai/gpt-2/blob/master/src/model.py. Its linear layers are convolutions
of width 1: stored (1, in, out), ours (out, in).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from groundup.errors import CheckpointError, DataError
from groundup.interop.huggingface import checked_weight, require_gpt2
from groundup.interop.imported import Imported, build_model, fit_vocabulary
from groundup.interop.tensor_bundle import DTYPES, Bundle, read_bundle, write_bundle
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.tokenizer.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, from_gpt2_files

HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
TOKENIZER_FILES = ("encoder.json", "vocab.bpe")
PREFIX = "model.ckpt"
SIZE_LIMIT = 2**24
TEXT_MAX_BYTES = 2**20  # of checkpoint and hparams.json; OpenAI's have less than 100
LAYER_NORM_EPSILON = 1e-5  # model.py, norm
NAMED_AT_MOST = 10

# What the optimizer adds has one more part: model/h0/attn/c_attn/w/Adam.
OF_THE_MODEL = re.compile(r"model/(wte|wpe|ln_f/[gb]|h\d+/(ln_[12]/[gb]|(attn|mlp)/c_(attn|proj|fc)/[wb]))")
# model_checkpoint_path: "…" with backslash escapes, as TensorFlow's text format writes it.
CHECKPOINT_PATH = re.compile(r'^[ \t]*model_checkpoint_path[ \t]*:[ \t]*"((?:[^"\\\n]|\\.)*)"[ \t]*$', re.MULTILINE)


def read_openai(directory: Path) -> Imported:
    """
    Read a GPT-2 from OpenAI's files, with its tokenizer where encoder.json and vocab.bpe are there.

    What fine-tuning adds to the file (the optimizer's moments, the step) is listed as unexpected, and not read.

    Raises:
        CheckpointError: a file is missing, cut short or damaged, or the weights do not fit hparams.json.
        DataError: encoder.json and vocab.bpe are no tokenizer.
    """
    config = _read_hparams(directory / "hparams.json")
    bundle = read_bundle(_find_prefix(directory))
    names = _names_in(bundle, config)
    _check_shapes(bundle, names, config)
    tokenizer = _read_tokenizer(directory)  # before the weights: what is wrong with it should not take minutes to hear
    unexpected = sorted(bundle.keys() - set(names.values()))
    if inside := [name for name in unexpected if OF_THE_MODEL.fullmatch(name)]:
        raise CheckpointError(
            f"checkpoint {directory}: hparams.json has no place for {len(inside)} tensors of the model (first: {inside[0]}); "
            "it is another model than hparams.json describes"
        )
    tensors = {
        ours: checked_weight(theirs, _from_convolution(bundle[theirs]), str(directory)) for ours, theirs in names.items()
    }
    config, tensors, reshaped = fit_vocabulary(config, tensors, tokenizer, f"checkpoint {directory}")
    return Imported(
        model=build_model(config, tensors, str(directory)),
        tokenizer=tokenizer,
        format="OpenAI checkpoint",
        unexpected=tuple(unexpected),
        reshaped=reshaped,
    )


def write_openai(model: GPT2, tokenizer: Tokenizer, directory: Path) -> None:
    """
    Write a GPT-2 as OpenAI's code loads it, in float32, into a directory that exists.

    There is no model.ckpt.meta: that is the graph of TensorFlow's operations, which only TensorFlow can write, and which
    code that builds the model itself, as OpenAI's does, never opens. Dropout rates have no place in the format.

    Raises:
        CheckpointError: the format has no place for something in the model or the tokenizer.
        OSError: the directory cannot be written.
    """
    config = model.config
    require_gpt2(config, "openai-state-dict")
    _check_expressible(config, tokenizer)
    _write_tokenizer(tokenizer, directory)
    sizes = (config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer)
    (directory / "hparams.json").write_bytes(f"{json.dumps(dict(zip(HPARAMS, sizes, strict=True)), indent=2)}\n".encode())
    (directory / "checkpoint").write_bytes(
        f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'.encode()
    )
    weights = model.state_dict()
    # Views: the writer copies them one at a time, so that a large model is not in memory twice.
    write_bundle(
        directory / PREFIX,
        {
            openai_name(name): tensor.float().T.unsqueeze(0) if _is_convolution(name) else tensor.float()
            for name, tensor in weights.items()
        },
    )


def openai_name(name: str) -> str:
    """OpenAI's name of a tensor: ``h.0.attn.c_attn.weight`` is ``model/h0/attn/c_attn/w``."""
    path, _, kind = re.sub(r"^h\.(\d+)\.", r"h\1.", name).rpartition(".")
    if path in ("wte", "wpe"):
        return f"model/{path}"
    letter = "b" if kind == "bias" else "w" if _is_convolution(name) else "g"
    return f"model/{path.replace('.', '/')}/{letter}"


def _is_convolution(name: str) -> bool:
    return name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name


def _from_convolution(tensor: torch.Tensor) -> torch.Tensor:
    """(1, in, out) to (out, in); others as they are."""
    return tensor[0].T.contiguous() if tensor.dim() == 3 else tensor


def _read_text(path: Path, what_to_do: str) -> str:
    """A small text file."""
    try:
        if path.stat().st_size > TEXT_MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"checkpoint {path}: cannot be read ({reason}); {what_to_do}") from None


def _read_hparams(path: Path) -> GPT2Config:
    """hparams.json: five whole numbers, and no others, because another could mean another computation."""
    advice = "OpenAI's folders have it: finish the download, or copy it from the model that was fine-tuned"
    text = _read_text(path, advice)
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: is not JSON ({error}); {advice}") from None
    if not isinstance(raw, dict) or raw.keys() != set(HPARAMS):
        given = ", ".join(map(repr, list(raw)[:NAMED_AT_MOST])) if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(f"checkpoint {path}: holds {given or 'nothing'}; GPT-2's has {', '.join(HPARAMS)}")
    for name in HPARAMS:
        value = raw[name]
        if type(value) is not int or not 1 <= value <= SIZE_LIMIT:
            raise CheckpointError(
                f"checkpoint {path}: {name} is {str(value)[:40]!r}, must be a whole number of 1 to {SIZE_LIMIT:,}"
            )
    vocab, positions, width, heads, layers = (raw[name] for name in HPARAMS)
    if width % heads:
        raise CheckpointError(f"checkpoint {path}: n_embd {width} is not divisible by n_head {heads}; one of them is wrong")
    return GPT2Config(vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads)


def _find_prefix(directory: Path) -> Path:
    """What the weights' files begin with, as ``checkpoint`` says; without that file, the only index there is."""
    path = directory / "checkpoint"
    if path.exists():
        found = CHECKPOINT_PATH.findall(_read_text(path, "delete it where the folder holds only one checkpoint"))
        # The folder may have moved since TensorFlow wrote the full path, also from Windows: \\ is its escaped separator.
        name = re.split(r"/|\\\\", found[0])[-1] if len(found) == 1 else ""
        if not name or name in (".", "..") or not name.isprintable() or "\\" in name:
            raise CheckpointError(
                f'checkpoint {path}: does not say which checkpoint is meant (model_checkpoint_path: "model.ckpt"); write that '
                "line, or delete the file where the folder holds only one"
            )
        return directory / name
    indexes = sorted(file.name for file in directory.glob("*.index"))
    if len(indexes) != 1:
        what = "holds no file that ends in .index; finish the download" if not indexes else f"holds {', '.join(indexes[:3])}"
        raise CheckpointError(
            f"checkpoint {directory}: has no file named checkpoint and {what}; fetch OpenAI's file checkpoint, which says what "
            "is meant"
        )
    return directory / indexes[0].removesuffix(".index")


def _names_in(bundle: Bundle, config: GPT2Config) -> dict[str, str]:
    """Our names of the model's tensors with OpenAI's, all of them in the file."""
    where = f"checkpoint {bundle.prefix}.index"
    # Before anything is built: a few bytes must not ask for millions of layers.
    if config.n_layer > len(bundle):
        raise CheckpointError(f"{where}: holds {len(bundle)} tensors, hparams.json says n_layer {config.n_layer}; one is wrong")
    one = _shapes(GPT2Config(vocab_size=1, n_positions=1, n_embd=1, n_layer=1, n_head=1))
    ours = [name for name in one if not name.startswith("h.")]
    ours += [
        f"h.{layer}.{name.removeprefix('h.0.')}" for layer in range(config.n_layer) for name in one if name.startswith("h.")
    ]
    names = {name: openai_name(name) for name in ours}
    missing = [theirs for theirs in names.values() if theirs not in bundle]
    if missing:
        listed = ", ".join(missing[:NAMED_AT_MOST]) + (", …" if len(missing) > NAMED_AT_MOST else "")
        raise CheckpointError(
            f"{where}: {len(missing)} of the model's {len(names)} tensors are missing: {listed}; it is another model than "
            "hparams.json describes"
        )
    return names


def _shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors under our names; takes no memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT2(config).state_dict().items()}


def _check_shapes(bundle: Bundle, names: dict[str, str], config: GPT2Config) -> None:
    """Compare what the index says with what hparams.json says, before anything is read."""
    wrong = []
    for ours, shape in _shapes(config).items():
        entry, expected = bundle.entries[names[ours]], (1, *shape[::-1]) if _is_convolution(ours) else shape
        dtype = DTYPES.get(entry.dtype)
        if entry.shape != expected:
            wrong.append(f"{names[ours]} {entry.shape} instead of {expected}")
        elif dtype is not None and not dtype.is_floating_point:
            wrong.append(f"{names[ours]} of whole numbers ({dtype})")
    if wrong:
        raise CheckpointError(
            f"checkpoint {bundle.prefix}.index: {len(wrong)} tensors do not fit hparams.json: "
            f"{'; '.join(wrong[:NAMED_AT_MOST])}"
        )


def _read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of OpenAI's two files; None where neither is there."""
    paths = [directory / name for name in TOKENIZER_FILES]
    missing = [path for path in paths if not path.exists()]
    if len(missing) == 1:
        raise CheckpointError(
            f"checkpoint {missing[0]}: is missing; fetch it, or delete the other of {' and '.join(TOKENIZER_FILES)}"
        )
    return None if missing else from_gpt2_files(*paths)


def _check_expressible(config: GPT2Config, tokenizer: Tokenizer) -> None:
    """See that the format can say what the model is; all reasons at once."""
    reasons = []
    if not config.tie_word_embeddings:
        reasons.append("its head is a matrix of its own (tie_word_embeddings false), OpenAI's is the token embedding")
    if config.n_inner not in (0, 4 * config.n_embd):
        reasons.append(f"n_inner is {config.n_inner}, OpenAI's is 4 × n_embd = {4 * config.n_embd}")
    if config.activation_function != "gelu_new":
        reasons.append(f"activation_function is {config.activation_function}, OpenAI's is gelu_new")
    if config.layer_norm_epsilon != LAYER_NORM_EPSILON:
        reasons.append(f"layer_norm_epsilon is {config.layer_norm_epsilon}, OpenAI's is {LAYER_NORM_EPSILON}")
    if tokenizer.vocab_size > config.vocab_size:
        reasons.append(f"the tokenizer has {tokenizer.vocab_size:,} ids, the model knows {config.vocab_size:,}")
    reasons += _tokenizer_reasons(json.loads(tokenizer.json), tokenizer)
    if reasons:
        raise CheckpointError(f"export to OpenAI's format: has no place for this model: {'; '.join(reasons)}; use --format hf")


def _tokenizer_reasons(spec: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """What encoder.json and vocab.bpe cannot say of a tokenizer.json."""
    reasons = []
    special = [token["content"] for token in spec.get("added_tokens", [])]
    if tokenizer.end_of_text != END_OF_TEXT or any(token != END_OF_TEXT for token in special):
        reasons.append(
            f"the tokenizer's special tokens are {', '.join(map(repr, special[:NAMED_AT_MOST]))}, OpenAI's is {END_OF_TEXT}"
        )
    if spec.get("normalizer") is not None or not _cuts_as_gpt2(spec["pre_tokenizer"]):
        reasons.append("the tokenizer prepares text in another way than GPT-2's")
    other = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    used = [name for name in other if spec["model"].get(name)]
    if used:
        reasons.append(f"the tokenizer's BPE uses {', '.join(used)}")
    return reasons


def _cuts_as_gpt2(stage: dict[str, Any]) -> bool:
    """Whether text is cut by GPT-2's pattern before it is merged, and by nothing else."""
    *before, level = stage.get("pretokenizers", [stage])
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        return False
    uses_pattern = level.get("use_regex", True)
    if not before:
        return bool(uses_pattern)
    split = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False}
    return before == [split] and not uses_pattern


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write encoder.json and vocab.bpe, and read them again to see that they are the same tokenizer."""
    encoder, bpe = (directory / name for name in TOKENIZER_FILES)
    model = json.loads(tokenizer.json)["model"]
    ids = model["vocab"] | {END_OF_TEXT: tokenizer.end_of_text_id}
    # tokenizer.json has a merge as "a b" or as ["a", "b"], by its age.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    encoder.write_bytes(json.dumps(dict(sorted(ids.items(), key=lambda item: item[1]))).encode())
    bpe.write_bytes("".join(f"{line}\n" for line in ("#version: 0.2", *merges)).encode())
    try:
        again = from_gpt2_files(encoder, bpe)
        same = again.token_bytes == tokenizer.token_bytes and again.end_of_text_id == tokenizer.end_of_text_id
        same = same and [" ".join(pair) for pair in json.loads(again.json)["model"]["merges"]] == merges
    except DataError:
        same = False
    if not same:
        raise CheckpointError(
            "export to OpenAI's format: encoder.json and vocab.bpe cannot hold this tokenizer (read again, they give other "
            "ids); use --format hf"
        )
