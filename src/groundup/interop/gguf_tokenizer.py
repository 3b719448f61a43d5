"""
The tokenizer in a GGUF file, out and in: tokens, their types, merges, and the name of how text is cut before merging.

Source: llama.cpp's src/llama-vocab.cpp, which says what it makes of each.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from groundup.errors import CheckpointError
from groundup.tokenizer.tokenizer import GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, Tokenizer, byte_to_character

PATTERNS = {"gpt-2": GPT2_PATTERN, "llama-bpe": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN}
"""llama.cpp's names for the split patterns that it runs as the tokenizer does (src/llama-vocab.cpp)."""
OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}

# GGUF's token types (llama.h, enum llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The tokenizer as llama.cpp reads it: a token for each row of the embedding, with its type, and the merges."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"export: the tokenizer has {tokenizer.vocab_size:,} ids, the model knows {vocab_size:,}; "
            "they belong to different models"
        )
    spec = json.loads(tokenizer.json)
    pre = _split_name(spec, tokenizer)
    tokens: list[str] = [""] * vocab_size
    types = [UNUSED] * vocab_size
    for token, index in spec["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    types[tokenizer.end_of_text_id] = CONTROL
    taken = set(tokens)
    for index in range(vocab_size):
        if types[index] == UNUSED:
            # llama.cpp refuses a vocabulary with two tokens of the same name.
            token = f"[PAD{index}]"
            while token in taken:
                token += "_"
            tokens[index] = token
            taken.add(token)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_key_value("tokenizer.ggml.merges", merges, gguf.GGUFValueType.ARRAY)
    writer.add_bos_token_id(tokenizer.end_of_text_id)
    writer.add_eos_token_id(tokenizer.end_of_text_id)
    writer.add_unk_token_id(tokenizer.end_of_text_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _split_name(spec: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """
    llama.cpp's name for how a tokenizer cuts text before merging.

    Raises:
        CheckpointError: llama.cpp would give other ids.
    """
    stage, model = spec["pre_tokenizer"], spec["model"]
    stages = stage.get("pretokenizers", [stage])
    regexes = [part["pattern"].get("Regex") for part in stages if part["type"] == "Split" and part["behavior"] == "Isolated"]
    regexes += [GPT2_PATTERN for part in stages if part["type"] == "ByteLevel" and part.get("use_regex", True)]
    name = next((name for name, pattern in PATTERNS.items() if regexes == [pattern]), None)
    odd = [part for part in stages if part["type"] not in ("Split", "ByteLevel") or part.get("invert")]
    plain = [token for token in spec["added_tokens"] if not token["special"]]
    unknown = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if name is None or odd or len(stages) > 2:
        problem = f"how it cuts text has no certain name in llama.cpp ({json.dumps(stage, ensure_ascii=False)[:200]})"
    elif spec.get("normalizer") is not None:
        problem = f"it changes text before it is cut (normalizer {spec['normalizer'].get('type')}), llama.cpp does not"
    elif any(model.get(key) for key in unknown):
        problem = f"it has one of {', '.join(unknown)}, which llama.cpp has not"
    elif any(token[key] for token in plain for key in ("lstrip", "rstrip", "single_word")):
        problem = "it has added tokens that look at what is around them, which a GGUF file cannot say"
    elif any(character not in model["vocab"] for character in byte_to_character()):
        problem = "it lacks tokens for some bytes, which llama.cpp would leave out"
    elif not tokenizer.runs_fast and bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        # For a tokenizer that runs fast every token encodes alone to itself, so it makes no difference.
        problem = f"ignore_merges is {bool(model.get('ignore_merges'))}, the opposite of what llama.cpp does for {name}"
    else:
        return name
    raise CheckpointError(f"export: the tokenizer cannot be written to a GGUF file: {problem}; export for Hugging Face instead")


def tokenizer_of(facts: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """
    The tokenizer of a file; None where it has none.

    Raises:
        CheckpointError: a tokenizer that we do not run.
    """
    kind = facts.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    pre = facts.get("tokenizer.ggml.pre")
    pattern = PATTERNS.get(OTHER_NAMES.get(str(pre), str(pre)))
    if kind != "gpt2" or pattern is None:
        raise CheckpointError(
            f"checkpoint {path}: its tokenizer.ggml.model is {kind!r} and tokenizer.ggml.pre {pre!r}, groundup knows gpt2 with "
            f"{', '.join(PATTERNS)}; if it is GPT-2's, say so in the file: gguf-new-metadata --pre-tokenizer gpt-2 IN OUT"
        )
    tokens, types = _texts(facts, "tokenizer.ggml.tokens"), facts.get("tokenizer.ggml.token_type")
    types = [NORMAL] * len(tokens) if types is None else [int(number) for number in types]
    end_id = facts["tokenizer.ggml.eos_token_id"]
    if len(types) != len(tokens) or not isinstance(end_id, int) or not 0 <= end_id < len(tokens):
        raise ValueError(f"{len(tokens)} tokens, {len(types)} token types, eos_token_id {end_id!r}")
    ids = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    if len(ids) != sum(number != UNUSED for number in types):
        raise ValueError("two tokens are the same")
    merges = [merge.split(" ") for merge in _texts(facts, "tokenizer.ggml.merges")]
    return _tokenizer_from(ids, types, merges, pattern, tokens[end_id])


def _texts(facts: Mapping[str, Any], name: str) -> list[str]:
    texts = facts[name]
    if not isinstance(texts, list):
        raise ValueError(f"{name} is no list of texts")
    return texts


def _tokenizer_from(
    ids: dict[str, int], types: Sequence[int], merges: Sequence[Sequence[str]], pattern: str, end_of_text: str
) -> Tokenizer:
    """
    Build the tokenizer that gives exactly these ids; the same file as ours, where the tokenizer is one that we trained.

    Raises:
        ValueError: merges or tokens contradict each other.
    """
    vocab = {token: index for token, index in ids.items() if types[index] == NORMAL and token != end_of_text}
    added = sorted(ids.keys() - vocab.keys(), key=lambda token: ids[token])
    # Added tokens get the ids after the vocabulary's; others' files that number them otherwise list them there too.
    if [*sorted(vocab.values()), *(ids[token] for token in added)] != list(range(len(ids))):
        vocab = ids
    try:
        slow = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab=vocab,
                merges=[(left, right) for left, right in merges],
                **({"ignore_merges": True} if pattern == LLAMA3_PATTERN else {}),
            )
        )
        stages = tokenizers.pre_tokenizers
        if pattern == GPT2_PATTERN:
            slow.pre_tokenizer = stages.ByteLevel(add_prefix_space=False)
        else:
            split = stages.Split(tokenizers.Regex(pattern), "isolated")
            slow.pre_tokenizer = stages.Sequence([split, stages.ByteLevel(add_prefix_space=False, use_regex=False)])
        slow.decoder = tokenizers.decoders.ByteLevel()
        for token in added:
            special = types[ids[token]] != USER_DEFINED or token == end_of_text
            entry = tokenizers.AddedToken(token, normalized=False, special=special)
            (slow.add_special_tokens if special else slow.add_tokens)([entry])
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"its tokens and merges do not fit each other ({error})") from None
    if slow.get_vocab(with_added_tokens=True) != ids:
        raise ValueError("its tokens and their types do not fit each other")
    return Tokenizer(slow.to_str(), end_of_text)
