"""How surprised a model is by each token: against plain logits, against evaluation, and as people see it."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

import groundup
from groundup.errors import ConfigError, DataError
from groundup.evaluation import surprise
from groundup.evaluation.measure import evaluate_model
from groundup.evaluation.surprise import token_surprise
from groundup.generation.generate import window_start
from groundup.interop.huggingface import save_model
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.tokenizer.tokenizer import byte_tokenizer
from groundup.tracking.surprise import SCALE, show_surprise
from tests.conftest import groundup as command
from tests.test_cli_errors import refused_at_once

FEW = settings(max_examples=15, deadline=None)
BYTES = byte_tokenizer()


def new_model(vocab_size: int = 13, n_positions: int = 12, seed: int = 0) -> GPT2:
    model = GPT2(GPT2Config(vocab_size=vocab_size, n_positions=n_positions, n_embd=16, n_layer=2, n_head=2)).double()
    initialize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def ids_of(length: int, seed: int = 0, below: int = 13) -> list[int]:
    return torch.randint(below, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logprobs_after(model: GPT2, ids: list[int], usable: int | None = None) -> Tensor:
    """The distribution after some ids, from scratch; beyond the context from at least half of one."""
    start = window_start(len(ids), model.config.n_positions)
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids[start:]])))[0, -1, :usable].float().log_softmax(-1)


@FEW
@given(
    before=st.integers(1, 30),
    length=st.integers(0, 40),
    positions=st.integers(1, 12),
    usable=st.sampled_from([None, 10]),
    top=st.integers(0, 15),
    seed=st.integers(0, 99),
)
@example(before=1, length=40, positions=1, usable=None, top=2, seed=0)
@example(before=1, length=12, positions=12, usable=None, top=2, seed=0)
@example(before=1, length=13, positions=12, usable=None, top=2, seed=0)
def test_every_token_has_the_probability_that_plain_logits_give_it(before, length, positions, usable, top, seed):
    """However much longer than the context the text is, and the context before it."""
    model, context, tokens = new_model(n_positions=positions, seed=seed), ids_of(before, seed, 10), ids_of(length, seed + 1, 10)
    found = token_surprise(model, context, tokens, top_logprobs=top, usable_ids=usable)
    assert [place.token for place in found] == tokens
    seen = context[-positions:]
    for place in found:
        expected = logprobs_after(model, seen, usable)
        assert place.logprob == pytest.approx(float(expected[place.token]), abs=1e-4)
        assert place.rank == int((expected > expected[place.token]).sum())
        assert len(place.top) == min(top, usable or 13)
        assert [value for _, value in place.top] == pytest.approx(
            expected.sort(descending=True).values[:top].tolist(), abs=1e-4
        )
        assert all(value == pytest.approx(float(expected[token]), abs=1e-4) for token, value in place.top)
        seen = [*seen, place.token]


@settings(max_examples=6, deadline=None)
@given(length=st.integers(1, 40), positions=st.integers(1, 12))
def test_each_token_is_predicted_from_half_a_context_where_there_is_one(length, positions):
    """Seen from outside: what stands half a context before a token changes its probability, whichever window it is in."""
    model, ids = new_model(n_positions=positions), ids_of(length + 1)
    plain = token_surprise(model, ids[:1], ids[1:])
    for at in range(length):
        back = at + 1 - max(1, positions // 2)
        if back >= 0:
            other = [*ids[:back], (ids[back] + 1) % 13, *ids[back + 1 :]]
            assert token_surprise(model, other[:1], other[1:])[at].logprob != plain[at].logprob


@FEW
@given(length=st.integers(1, 30), rows=st.integers(1, 9))
def test_it_does_not_matter_how_many_logits_are_formed_at_once(length, rows):
    model, ids = new_model(), ids_of(length)
    expected = token_surprise(model, [0], ids, top_logprobs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surprise, "ROWS", rows)
        found = token_surprise(model, [0], ids, top_logprobs=2)
    assert [place.logprob for place in found] == pytest.approx([place.logprob for place in expected], abs=1e-5)
    assert [(place.token, place.rank, [i for i, _ in place.top]) for place in found] == (
        [(place.token, place.rank, [i for i, _ in place.top]) for place in expected]
    )


def test_dropout_is_off():
    model = new_model()
    expected = token_surprise(model, [0], ids_of(9))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert token_surprise(model.train(), [0], ids_of(9)) == expected


# --- the recipe ---


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surprise")
    save_model(new_model(257, 32).float(), folder, end_of_text_id=256)
    BYTES.save(folder)
    return folder


def scored(path: Path, text: Any, **options: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = groundup.score(path, text=text, device="cpu", **options)["texts"]
    return found


def test_the_summary_follows_from_the_tokens(model_folder):
    text = "naïve 日本, and a line\nor two. Longer than the context of the model."
    result = scored(model_folder, text)[0]
    tokens, size = result["tokens"], len(text.encode())
    nats = -sum(token["logprob"] for token in tokens)
    assert [token["id"] for token in tokens] == BYTES.encode(text).tolist()
    assert result["text"] == text
    assert result["loss"] == pytest.approx(nats / size)
    assert result["perplexity"] == pytest.approx(math.exp(nats / size))
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert [token["bits"] for token in tokens] == pytest.approx([-token["logprob"] / math.log(2) for token in tokens])
    assert set(tokens[0]) == {"token", "bytes", "id", "logprob", "bits", "rank", "top_logprobs"}
    assert all(len(token["top_logprobs"]) == 5 for token in tokens)
    expected = token_surprise(groundup.load(model_folder).model, [256], BYTES.encode(text).tolist())
    assert [token["logprob"] for token in tokens] == pytest.approx([place.logprob for place in expected])


def test_bits_per_byte_are_those_of_evaluation_on_the_same_window(model_folder):
    """One window that begins where a document does and is as long as the context."""
    from contextlib import nullcontext

    from groundup.data.batches import to_batch

    text = "the cat sat on the naïve mat!!!"[:31]
    assert len(text.encode()) == 32
    loaded = groundup.load(model_folder)
    window = np.array([[256, *BYTES.encode(text).tolist()]])
    expected = evaluate_model(loaded.model, [to_batch(window, torch.device("cpu"))], BYTES.token_byte_counts, nullcontext)
    found = scored(model_folder, text)[0]
    assert expected is not None
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert sum(token["rank"] == 0 for token in found["tokens"]) / 32 == expected.token_accuracy


def test_several_texts_in_order_each_a_document_of_its_own(model_folder, tmp_path):
    (tmp_path / "file.txt").write_text("from a file\n", encoding="utf-8")
    together = scored(model_folder, ("one", "two"), text_file=str(tmp_path / "file.txt"), top_logprobs=1)
    assert [text["text"] for text in together] == ["one", "two", "from a file"]
    for text in together:
        alone = scored(model_folder, text["text"], top_logprobs=1)[0]
        assert alone == text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ConfigError, "text: none given"),
        ({"text": ""}, DataError, "number 1 is empty"),
        ({"text": ("a", "")}, DataError, "number 2 is empty"),
        ({"text_file": ("-", "-")}, ConfigError, "text_file: - (standard input) is given twice"),
        ({"text_file": "absent.txt"}, DataError, "text_file: absent.txt cannot be read"),
        ({"text": "a", "top_logprobs": -1}, ConfigError, "top_logprobs: -1"),
        ({"text": "a", "prompt": "b"}, ConfigError, "prompt: no such option"),
    ],
    ids=str,
)
def test_nothing_to_score_is_said_before_anything_is_loaded(tmp_path, options, error, words):
    with pytest.raises(error) as caught:
        groundup.score(tmp_path / "no model here", **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- for people ---


def facts(*pairs: tuple[str, float]) -> dict[str, Any]:
    """A result with these tokens and bits."""
    tokens = [
        {"token": token, "bytes": list(token.encode()), "bits": bits, "rank": place}
        for place, (token, bits) in enumerate(pairs)
    ]
    return {"tokens": tokens, "loss": 1.25, "perplexity": 1234.5, "bits_per_byte": 2.5}


def shown(result: dict[str, Any], *, terminal: bool, width: int = 40) -> str:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=width, soft_wrap=True,
        highlight=False, markup=False, legacy_windows=False,
    )  # fmt: skip
    show_surprise(result, console)
    return file.getvalue()


ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")


def test_where_there_is_no_terminal_it_is_a_table_that_programs_can_read():
    lines = shown(facts(("the", 0.5), ("\n", 7.25), ("'[bold]:smile:", 100.0)), terminal=False).splitlines()
    assert [line.split("\t") for line in lines[:4]] == [
        ["bits", "rank", "token"], ["0.50", "0", "'the'"], ["7.25", "1", r"'\n'"], ["100.00", "2", "\"'[bold]:smile:\""],
    ]  # fmt: skip
    assert lines[4] == "3 tokens: loss 1.2500, perplexity 1,234.50, 2.500 bits per byte"


def test_long_tokens_are_one_line_of_the_table_however_narrow_the_output():
    assert len(shown(facts(("word" * 50, 1.0)), terminal=False, width=20).splitlines()) == 3


def test_at_a_terminal_the_text_is_there_as_it_is_and_its_colours_follow_the_scale():
    tokens = [("a[bold]", 0.5), (":smile: ", 3.0), ("line\nbreak", 5.0), ("red", 9.0), ("unheard of", 30.0)]
    output = shown(facts(*tokens), terminal=True)
    assert ESCAPE.sub("", output).startswith("".join(token for token, _ in tokens) + "\n")
    styles = {
        token: (ESCAPE.findall(before) or [""])[-1]
        for (token, _), before in zip(tokens, re.split("a.bold.|:smile: |line\n?|red|unheard", output)[:5], strict=True)
    }
    assert len({styles["a[bold]"], styles["line\nbreak"], styles["red"], styles["unheard of"]}) == 4
    assert "7" in styles["unheard of"].split(";"), "the strongest is reversed, not only coloured"
    plain = ESCAPE.sub("", output)
    assert all(words in plain for _, words, _ in SCALE)
    assert plain.splitlines()[-1].startswith("5 tokens: loss 1.2500")


def test_a_long_line_is_not_cut_at_the_width_of_the_terminal():
    plain = ESCAPE.sub("", shown(facts(*[("word ", 1.0)] * 40), terminal=True))
    assert plain.splitlines()[0] == "word " * 40


def test_a_character_of_several_tokens_can_be_read_at_a_terminal(model_folder):
    """A byte tokenizer, and GPT-2's for most languages, cut characters into pieces that are none by themselves."""
    plain = ESCAPE.sub("", shown(scored(model_folder, "naïve 日本 😀")[0], terminal=True))
    assert plain.splitlines()[0] == "naïve 日本 😀"


@pytest.mark.parametrize("characters", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b2J", "\r", "\b"], ids=repr)
def test_a_text_cannot_send_commands_to_the_terminal(characters):
    output = ESCAPE.sub("", shown(facts(("a", 0.5), (characters, 0.5), ("b", 0.5)), terminal=True))
    assert not set("\x1b\x9b\x07\r\b") & set(output)


@pytest.mark.slow
def test_the_command_prints_what_the_function_returns(model_folder, tmp_path):
    (tmp_path / "file.txt").write_text("from a file\n", encoding="utf-8")
    done = command(
        "score", model_folder, "--text", "naïve", "--text-file", tmp_path / "file.txt", "--text_file", "-", "--device", "cpu",
        "--top-logprobs", 2, "--json", stdin="piped 日本".encode(),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    expected = groundup.score(model_folder, text=("naïve", "from a file", "piped 日本"), device="cpu", top_logprobs=2)
    assert done.json == json.loads(json.dumps(expected))


@pytest.mark.slow
def test_the_command_prints_a_table_into_a_pipe(model_folder):
    done = command("score", model_folder, "--text", "ab\tc", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split() == ["bits", "rank", "token"]
    expected = scored(model_folder, "ab\tc")[0]
    assert [line.split() for line in done.out.splitlines()[1:5]] == [
        [f"{token['bits']:.2f}", str(token["rank"]), repr(token["token"])] for token in expected["tokens"]
    ]
    assert done.out.splitlines()[5].startswith("4 tokens: loss ")
    assert "\x1b" not in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, ["text: none given"]),
        (["--text", ""], 3, ["number 1 is empty"]),
        (["--text-file", "-"], 3, ["standard input is not UTF-8 (byte 1"]),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(model_folder, flags, code, words):
    refused_at_once(command("score", model_folder, *flags, stdin=b"a\xff"), code, *words)


@pytest.mark.slow
def test_a_text_of_many_contexts_takes_seconds(model_folder):
    import time

    started = time.perf_counter()
    assert len(scored(model_folder, "the cat sat. " * 10_000, top_logprobs=1)[0]["tokens"]) == 130_000
    assert time.perf_counter() - started < 60
