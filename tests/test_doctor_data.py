"""doctor on data: each fault of a text is found, and a sound text passes."""

import numpy as np
import pytest

from groundup.diagnostics.check import Check
from groundup.diagnostics.data import (
    NAMES,
    Text,
    Use,
    documents,
    enough_check,
    examine_data,
    window_hashes,
    window_length,
    window_overlap,
)
from groundup.tokenizer.tokenizer import byte_tokenizer
from groundup.tokenizer.training import train_bpe
from tests.conftest import make_text

BYTES = byte_tokenizer()
USE = Use(weights=50_000, epochs=3)


def tokens(*texts: str | bytes) -> np.ndarray:
    """Documents with their ends, as a dataset holds them."""
    parts = []
    for text in texts:
        data = text if isinstance(text, bytes) else text.encode()
        parts.append(np.array([*data, BYTES.end_of_text_id], dtype=np.uint16))
    return np.concatenate(parts)


def prose(number: int, words: int = 400) -> str:
    """Text without a repetition that is longer than a window."""
    draw = np.random.default_rng(number)
    return " ".join("".join(chr(97 + letter) for letter in draw.integers(0, 26, 6)) for _ in range(words)) + "\n"


SOUND = [prose(number) for number in range(12)]


def examined(train: np.ndarray, validation: np.ndarray, **known: int) -> dict[str, Check]:
    return {check.name: check for check in examine_data(Text(train, validation, BYTES, len(train), **known), USE)}


def alarms(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.passed is False]


def test_sound_text_raises_no_alarm() -> None:
    found = examined(tokens(*SOUND[:10]), tokens(*SOUND[10:]))
    assert tuple(found) == NAMES
    assert alarms(found) == []
    assert all(check.group == "data" and check.passed for check in found.values())


def test_copies_of_documents_are_found() -> None:
    found = examined(tokens(*SOUND[:8], SOUND[0], SOUND[1]), tokens(*SOUND[10:]))
    assert alarms(found) == ["duplicated_documents"]
    assert "2 of 10" in found["duplicated_documents"].measured


def test_a_document_on_both_sides_is_found() -> None:
    found = examined(tokens(*SOUND[:10]), tokens(SOUND[3], SOUND[11]))
    assert alarms(found) == ["train_validation_overlap"]
    assert "50.0% of the validation text in documents" in found["train_validation_overlap"].measured


def test_text_that_was_copied_into_another_document_is_found_too() -> None:
    found = examined(tokens(*SOUND[:9], "before " + SOUND[10] + "after"), tokens(*SOUND[10:]))
    check = found["train_validation_overlap"]
    assert check.passed is False
    assert "0.0% of the validation text in documents" in check.measured


def test_no_validation_text_is_no_fault() -> None:
    assert examined(tokens(*SOUND), np.empty(0, np.uint16))["train_validation_overlap"].passed is None


def test_lines_that_no_person_writes_are_found() -> None:
    found = examined(tokens(*SOUND[:10], "x" * 15_000), tokens(*SOUND[10:]))
    assert "longest_lines" in alarms(found)
    assert "15,000 bytes" in found["longest_lines"].measured


def test_rows_of_a_table_are_no_long_line() -> None:
    """Each of a jsonl's texts is a document without a line break at its end."""
    rows = [prose(number, words=50).strip() for number in range(120)]
    check = examined(tokens(*rows[:100]), tokens(*rows[100:]))["longest_lines"]
    assert check.passed
    assert "the longest line is 349 bytes" in check.measured
    # One that is longer than what is looked at, and so has no end there, is looked at all the same.
    whole = tokens(*rows[:10], "x" * 20_000)[:-1]
    assert examined(whole, tokens(*rows[100:]))["longest_lines"].passed is False


@pytest.mark.parametrize("rubbish", [bytes(range(32)) * 40, "\N{REPLACEMENT CHARACTER}".encode() * 400])
def test_bytes_that_no_text_has_are_found(rubbish: bytes) -> None:
    assert "unreadable_bytes" in alarms(examined(tokens(*SOUND[:10], rubbish), tokens(*SOUND[10:])))


def test_replaced_sequences_are_told() -> None:
    assert "7 invalid" in examined(tokens(*SOUND[:10]), tokens(*SOUND[10:]), replaced_sequences=7)["unreadable_bytes"].measured


def test_too_little_text_and_too_many_readings() -> None:
    assert enough_check(10**6, Use(800_000, 3)).passed
    book = enough_check(300_000, Use(124_000_000, 3))
    assert book.passed is False
    assert "--init-from" in book.advice
    assert enough_check(300_000, Use(124_000_000, 3, pretrained=True)).passed
    often = enough_check(10**6, Use(800_000, 60))
    assert often.passed is False
    assert "60 times" in often.measured


def test_a_vocabulary_that_the_text_does_not_use_is_found() -> None:
    tokenizer = train_bpe([make_text(8000), *SOUND], 2048)
    assert tokenizer.vocab_size > 1024
    few = np.full(5000, 7, dtype=np.uint16)
    text = Text(few, few, tokenizer, len(few))
    found = {check.name: check for check in examine_data(text, USE)}
    assert found["vocabulary_used"].passed is False
    assert found["vocabulary_used"].culprit == "vocabulary_too_large"
    again = {check.name: check for check in examine_data(text, Use(50_000, 3, pretrained=True))}
    assert again["vocabulary_used"].passed


def test_a_part_is_said_to_be_one() -> None:
    train = tokens(*SOUND[:10])
    text = Text(train[:2000], tokens(*SOUND[10:]), BYTES, len(train))
    found = {check.name: check for check in examine_data(text, USE)}
    assert "of the first 2,000 of" in found["vocabulary_used"].measured


def test_windows_have_equal_hashes_where_they_are_equal() -> None:
    draw = np.random.default_rng(0)
    stream = draw.integers(0, 4, 5000).astype(np.uint16)
    for length in (1, 2, 8, 32):
        hashes = window_hashes(stream, length)
        assert len(hashes) == len(stream) - length + 1
        own = [stream[start : start + length].tobytes() for start in range(len(hashes))]
        by_window: dict[bytes, int] = {}
        for window, value in zip(own, hashes.tolist(), strict=True):
            assert by_window.setdefault(window, value) == value
        assert len(set(by_window.values())) == len(by_window)


def test_the_overlap_of_windows_is_the_share_that_was_planted() -> None:
    draw = np.random.default_rng(1)
    train, validation = (draw.integers(0, 60_000, 40_000).astype(np.uint16) for _ in range(2))
    assert window_overlap(train, validation, 32) == 0
    validation[10_000:20_000] = train[5_000:15_000]
    assert window_overlap(train, validation, 32) == pytest.approx(0.25, abs=0.01)
    assert window_overlap(train[:10], validation, 32) is None


def test_a_window_is_as_much_text_whatever_the_tokens_are() -> None:
    train = tokens(*SOUND)
    assert window_length(Text(train, train, BYTES, len(train))) == 128


def test_documents_end_where_their_end_stands() -> None:
    stream = tokens("one", "", "two")
    assert [bytes(part.astype(np.uint8)) for part in documents(stream, BYTES.end_of_text_id)] == [b"one", b"two"]
    assert [len(part) for part in documents(stream[:2], BYTES.end_of_text_id)] == [2]
