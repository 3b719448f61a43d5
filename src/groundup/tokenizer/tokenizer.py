"""
A byte-level BPE tokenizer: stored as Hugging Face's tokenizer.json, run by tiktoken.

tiktoken encodes ten times faster than the library that the file format comes from, so it runs whenever it provably
gives the same ids; otherwise ``tokenizers`` encodes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers

from groundup.errors import DataError
from groundup.tokenizer.pieces import PIECE_CHARACTERS, pieces

END_OF_TEXT = "<|endoftext|>"

# Radford et al. 2019, released code: https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same splits, written so that tiktoken's regex engine never backtracks over long runs.
GPT2_PATTERN_POSSESSIVE = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)  # fmt: skip

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_PATTERN = rf"{_LETTERS}|\p{{N}}|{_REST}"
TOTAL_PATTERNS = frozenset({GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN})
"""
GPT-2's, Llama 3's and Qwen 2's: patterns that match every character. What another leaves between its matches, tiktoken
would drop and tokenizers keep.
"""

TokenArray = npt.NDArray[np.uint32]


def byte_to_character() -> list[str]:
    """GPT-2's printable stand-in for each byte value, which tokenizer files use as letters of their vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class Tokenizer:
    """Text to token ids and back; text that spells a special token is ordinary text."""

    def __init__(self, tokenizer_json: str, end_of_text: str = END_OF_TEXT, origin: str = "tokenizer.json"):
        """
        Args:
            tokenizer_json: content of a tokenizer.json with a byte-level BPE model.
            end_of_text: the token that ends a document.
            origin: where the content came from, for error messages.

        Raises:
            DataError: not a byte-level BPE tokenizer, or without the end-of-text token.
        """
        self.json = tokenizer_json
        self.end_of_text = end_of_text
        try:
            self._spec: dict[str, Any] = json.loads(tokenizer_json)
            _require_harmless(self._spec)
            self._slow = tokenizers.Tokenizer.from_str(tokenizer_json)
        except BaseException as error:  # the library raises bare Exception, and panics that are not even that
            if not _is_refusal(error):
                raise
            raise DataError(f"tokenizer {origin}: cannot be read as a tokenizer.json: {error}") from None
        self._slow.encode_special_tokens = True
        self._slow.no_truncation()
        self._slow.no_padding()
        self._require_byte_level(origin)
        end_id = self._slow.token_to_id(end_of_text)
        if end_id is None:
            raise DataError(
                f"tokenizer {origin}: has no end-of-text token {end_of_text!r}, which must end every document; "
                "name its own one as eos_token in a tokenizer_config.json beside it"
            )
        self.end_of_text_id: int = end_id
        self.vocab_size: int = max(self._slow.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def sha256(self) -> str:
        """Hash of the file's content and the end-of-text token: equal tokenizers give equal ids."""
        return hashlib.sha256(f"{self.json}\0{self.end_of_text}".encode()).hexdigest()

    def gives_the_ids_of(self, other: "Tokenizer") -> bool:
        """
        Whether this gives every text the ids that ``other`` gives it, and knows all its special tokens.

        As far as the files show it, however they are spelled. A tokenizer with more special tokens gives the ids of the one
        that it was made from, but not the other way round: ``other``'s tokens are never beyond this one's vocabulary.
        """
        if self.sha256 == other.sha256:
            return True
        return other.special_ids.items() <= self.special_ids.items() and self._rules == other._rules is not None

    @cached_property
    def _rules(self) -> object:
        """What decides the ids of text; None where the file does more than this knows."""
        if (pattern := self._split_pattern()) is None:
            return None
        model = self._spec["model"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        switches = {name: value for name, value in model.items() if name not in ("vocab", "merges") and value}
        known = self._slow.get_vocab(with_added_tokens=True).items()
        return pattern, merges, switches, {token: index for token, index in known if token not in self.special_ids}

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Names of the special tokens, which no text spells, with their ids; end-of-text among them."""
        special = {token["content"] for token in self._spec.get("added_tokens", []) if token.get("special")}
        known = self._slow.get_vocab(with_added_tokens=True).items()
        return {name: index for name, index in sorted(known, key=lambda item: item[1]) if name in special}

    def with_special_tokens(self, names: Sequence[str]) -> "Tokenizer":
        """
        The same tokenizer with special tokens after its last id; those that it has already stay where they are.

        All other ids are as before, so token arrays of the one are token arrays of the other.

        Raises:
            DataError: a name is an ordinary token, or the ids have gaps, so that "after the last" is not certain.
        """
        if all(name in self.special_ids for name in names):
            return self
        spec, vocabulary = json.loads(self.json), self._slow.get_vocab(with_added_tokens=True)
        added = {token["content"]: token for token in spec.get("added_tokens", [])}
        if spelled := [name for name in names if name in vocabulary and name not in added]:
            raise DataError(
                f"tokenizer: {spelled[0]!r} is one of its tokens of ordinary text, so it cannot become special; use another one"
            )
        for name in added.keys() & set(names):
            added[name]["special"] = True
        new = [name for name in dict.fromkeys(names) if name not in added]
        slow = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
        slow.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in new])
        expected = vocabulary | {name: self.vocab_size + number for number, name in enumerate(new)}
        if slow.get_vocab(with_added_tokens=True) != expected:
            raise DataError(
                f"tokenizer: its ids have gaps below {self.vocab_size:,}, so {new[0]} finds no place; use another one"
            )
        return Tokenizer(slow.to_str(), self.end_of_text)

    def encode(self, text: str) -> TokenArray:
        """
        Token ids of a text, 1-D uint32, without end-of-text.

        Raises:
            DataError: the library cannot encode it.
        """
        # Long runs without a break exhaust the stack of the regex engines.
        if len(text) > 2 * PIECE_CHARACTERS:
            return np.concatenate([self.encode(piece) for piece in pieces([text])])
        try:
            if self._fast is not None:
                return np.asarray(self._fast.encode_ordinary(text), dtype=np.uint32)
            return np.asarray(self._slow.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except BaseException as error:
            if not _is_refusal(error):
                raise
            raise DataError(f"tokenizer: cannot encode a text of {len(text):,} characters ({type(error).__name__})") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of token ids; special tokens have none."""
        table = self.token_bytes
        return b"".join(table[index] for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spelled(self, token: int) -> str:
        """One token for people: its text, its name where it is special; bytes that are no character become U+FFFD."""
        text = self.decode([token]) or (self._slow.id_to_token(token) or "")
        return str(text)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token id; empty for special tokens and for unused ids."""
        byte_of = {character: byte for byte, character in enumerate(byte_to_character())}
        table = [b""] * self.vocab_size
        for token, index in self._slow.get_vocab(with_added_tokens=True).items():
            if token not in self.special_ids:
                letters = [byte_of.get(character) for character in token]
                table[index] = token.encode() if None in letters else bytes(b for b in letters if b is not None)
        return table

    @cached_property
    def token_byte_counts(self) -> npt.NDArray[np.int64]:
        """Length in bytes of each token id, (vocab_size,)."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @property
    def runs_fast(self) -> bool:
        """Whether tiktoken encodes, with ids proved equal."""
        return self._fast is not None

    @cached_property
    def _fast(self) -> tiktoken.Encoding | None:
        pattern = self._split_pattern()
        if pattern is None or not self._merges_follow_ranks():
            return None
        byte_of = {character: byte for byte, character in enumerate(byte_to_character())}
        added = {token["content"] for token in self._spec.get("added_tokens", [])}
        ranks = {
            bytes(byte_of[character] for character in token): index
            for token, index in self._spec["model"]["vocab"].items()
            if token not in added
        }
        return tiktoken.Encoding(
            "groundup", pat_str=pattern, mergeable_ranks=ranks, special_tokens={self.end_of_text: self.end_of_text_id}
        )

    def _split_pattern(self) -> str | None:
        """The regular expression that cuts text before merging, or None where the file does something else too."""
        if self._spec.get("normalizer") is not None:
            return None
        if any(not token.get("special") for token in self._spec.get("added_tokens", [])):
            return None  # it matches in ordinary text, before the pattern cuts
        stage = self._spec["pre_tokenizer"]
        if stage["type"] == "ByteLevel" and stage.get("use_regex", True) and not stage["add_prefix_space"]:
            return GPT2_PATTERN_POSSESSIVE
        if stage["type"] == "Sequence" and len(stage["pretokenizers"]) == 2:
            split, level = stage["pretokenizers"]
            plain = not level.get("use_regex", True) and not level.get("add_prefix_space")
            if split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"] and plain:
                pattern: str | None = split["pattern"].get("Regex")
                if pattern == GPT2_PATTERN:
                    return GPT2_PATTERN_POSSESSIVE
                return pattern if pattern in TOTAL_PATTERNS else None
        return None

    def _merges_follow_ranks(self) -> bool:
        """
        Prove that merging by token id, as tiktoken does, equals merging by the listed pairs.

        The two could differ only where neighbours that are no listed pair spell a token. Take the first such moment:
        up to it both made the same merges, and none crossed the token's edges, so its bytes went through the same
        states as when encoded alone. If alone they end as that token, the state before was its listed pair. So it is
        enough that ids rise in the order of the merges, and that every token encodes alone to itself.
        """
        model = self._spec["model"]
        if model.get("dropout") or model.get("ignore_merges") or model.get("byte_fallback"):
            return False
        vocab: dict[str, int] = model["vocab"]
        if any(character not in vocab for character in byte_to_character()):
            return False
        merged = [vocab["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in model["merges"]]
        if any(later <= earlier for earlier, later in zip(merged, merged[1:], strict=False)):
            return False
        added = {token["content"] for token in self._spec.get("added_tokens", [])}
        tokenize = self._slow.model.tokenize
        return all(
            len(pieces := tokenize(token)) == 1 and pieces[0].id == index
            for token, index in vocab.items()
            if token not in added
        )

    def _require_byte_level(self, origin: str) -> None:
        stage = self._spec.get("pre_tokenizer") or {}
        stages = stage.get("pretokenizers", [stage])
        kind = self._spec["model"].get("type", "of no type")
        if any(part.get("add_prefix_space") for part in stages):
            raise DataError(
                f"tokenizer {origin}: puts a space before every text (add_prefix_space), so it does not give back what it was "
                "given; use one without"
            )
        if kind != "BPE" or not any(part.get("type") == "ByteLevel" for part in stages):
            raise DataError(
                f"tokenizer {origin}: model {kind} is not byte-level BPE; use a tokenizer of "
                "GPT-2's kind (GPT-2, Llama 3, Qwen, StarCoder), or --tokenizer bpe to train one"
            )

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as ``transformers.AutoTokenizer`` reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.end_of_text,
            "eos_token": self.end_of_text,
            "unk_token": self.end_of_text,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer.json").write_bytes(self.json.encode())
        (directory / "tokenizer_config.json").write_bytes(json.dumps(config, indent=2).encode())


def load_tokenizer(path: Path) -> Tokenizer:
    """
    Read a tokenizer.json, a folder that holds one, or a folder with GPT-2's two files.

    The two files are vocab.json and merges.txt (Hugging Face's names) or encoder.json and vocab.bpe (OpenAI's).

    Raises:
        DataError: none of these is there, or the file is no byte-level BPE tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"tokenizer {file}: is not UTF-8 text: {error}") from None
        except OSError as error:
            raise DataError(f"tokenizer {file}: cannot be read ({error.strerror}); make it readable") from None
        return Tokenizer(text, _end_of_text_beside(file), origin=str(file))
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        vocab, merges = path / vocab_name, path / merges_name
        if vocab.is_file() and merges.is_file():
            return from_gpt2_files(vocab, merges)
    raise DataError(
        f"tokenizer {path}: not found; give byte, bpe, gpt2, a tokenizer.json, or a folder with tokenizer.json, or with "
        "vocab.json and merges.txt"
    )


def from_gpt2_files(vocab: Path, merges: Path) -> Tokenizer:
    """Build the tokenizer from GPT-2's vocabulary (JSON) and merges (one pair a line)."""
    try:
        ids = json.loads(vocab.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines[1:] if line)]
        return from_merges(ids, pairs)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer {vocab}, {merges}: cannot be read as GPT-2's files: {error}") from None


def from_merges(vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Build a tokenizer with GPT-2's split pattern from a vocabulary and its merges in order."""
    slow = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    slow.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    slow.decoder = tokenizers.decoders.ByteLevel()
    slow.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return Tokenizer(slow.to_str())


def byte_tokenizer() -> Tokenizer:
    """256 bytes, each its own id, and end-of-text."""
    return from_merges({character: byte for byte, character in enumerate(byte_to_character())}, [])


def _is_refusal(error: BaseException) -> bool:
    """Whether a library could not do it: an exception, or a panic of its Rust code, which is no subclass of Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _require_harmless(spec: dict[str, Any]) -> None:
    """Refuse what makes the library panic or abort, and no byte-level BPE tokenizer has."""
    if "Precompiled" in json.dumps(spec.get("normalizer")):
        raise ValueError("a Precompiled normalizer is not of byte-level BPE")
    if prefix := spec["model"].get("continuing_subword_prefix"):
        raise ValueError(f"continuing_subword_prefix {prefix!r} is not of byte-level BPE")


def _end_of_text_beside(file: Path) -> str:
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            str(token).encode()
        except (ValueError, AttributeError, RecursionError, OSError) as error:
            raise DataError(f"tokenizer {config}: cannot be read as a tokenizer_config.json: {error}") from None
        if token:
            return str(token)
    return END_OF_TEXT
