"""Filling a hole: what the model is given, what comes back and is shown, what does not fit, and that it can be learned."""

import json
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import numpy as np
import pytest
import torch

import groundup
from groundup.config.load import Given, resolve
from groundup.config.options import GENERATE_GROUPS
from groundup.data.fim import FillInTheMiddle
from groundup.errors import ConfigError
from groundup.generation.generate import generate_tokens
from groundup.generation.sampling import Sampler
from groundup.interop.huggingface import load_model, save_model
from groundup.interop.imported import with_vocabulary
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.loss import next_token_loss
from groundup.tokenizer.special import FIM_TOKENS
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.test_fim import InMemory
from tests.test_generation import CONFIG, new_model, save_speaker

BYTES = byte_tokenizer().with_special_tokens(FIM_TOKENS)
SEP, PRE, MID, SUF, PAD = (BYTES.special_ids[name] for name in FIM_TOKENS)
END = BYTES.end_of_text_id


def save_filler(folder: Path, n_positions: int = 48, end: float = -9.0) -> Path:
    """A model that writes lively printable ASCII, and would like to write the marks of a hole even better."""
    folder.mkdir(exist_ok=True)
    save_speaker(folder, n_positions, vocab_size=262, end=end)
    model = load_model(folder)
    with torch.no_grad():
        model.head_weight[[PRE, MID, SUF, PAD], 0] = 1.0
    save_model(model, folder, end_of_text_id=END)
    BYTES.save(folder)
    return folder


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_filler(tmp_path_factory.mktemp("filler"))


def filled(path: Path, **options: Any) -> tuple[list[dict[str, Any]], str, list[str]]:
    """Completions, what is streamed, and the lines that are said."""
    from groundup.recipes.generate import generate

    pieces: list[str] = []
    lines: list[str] = []
    given = {"device": "cpu", **options}
    resolved = resolve(GENERATE_GROUPS, {name: Given(value, f"argument {name}") for name, value in given.items()})
    result = generate(path, resolved, lines.append, pieces.append)
    return json.loads(json.dumps(result))["completions"], "".join(pieces), lines


def greedy_after(path: Path, ids: list[int], tokens: int) -> list[int]:
    drawn = generate_tokens(
        load_model(path), [ids], Sampler(temperature=0), seeds=[0], max_new_tokens=tokens, end_of_text_id=END, usable_ids=PRE
    )
    return [choice.token for choice in drawn]


# --- what goes in and what comes back ---


@pytest.mark.parametrize(("prefix", "suffix"), [("é(", ")"), ("a", ""), ("", "b")])
@pytest.mark.parametrize("order", ["spm", "psm", None])
def test_a_hole_is_what_is_around_it_and_then_its_middle(filler, prefix, suffix, order):
    options = {"fim_order": order} if order else {}
    found, shown, lines = filled(filler, prefix=prefix, suffix=suffix, max_new_tokens=12, temperature=0.0, **options)
    before, after = prefix.encode(), suffix.encode()
    ids = [PRE, *before, SUF, *after, MID] if order == "psm" else [PRE, SUF, *after, MID, *before]
    assert found[0]["token_ids"] == greedy_after(filler, ids, 12)
    assert (found[0]["prompt"], found[0]["suffix"]) == (prefix, suffix)
    assert found[0]["text"] == BYTES.decode(found[0]["token_ids"])
    assert found[0]["finish_reason"] == "length"
    # The middle, to the letter, and no line about a missing prompt.
    assert shown == found[0]["text"]
    assert lines == []


def test_a_hole_ends_at_end_of_text(tmp_path):
    silent = save_filler(tmp_path, end=9.0)
    found, shown, _ = filled(silent, prefix="a", suffix="b", max_new_tokens=5)
    assert (found[0]["text"], found[0]["token_ids"], found[0]["finish_reason"], shown) == ("", [END], "stop", "")


def test_several_fillings_and_stop_strings(filler):
    found, shown, _ = filled(filler, prefix="a", suffix="b", num_return_sequences=3, max_new_tokens=9)
    assert [completion["prompt"] + completion["suffix"] for completion in found] == ["ab"] * 3
    assert len({completion["text"] for completion in found}) == 3
    assert shown == "".join(f"--- {n} of 3 ---\n{completion['text']}\n" for n, completion in enumerate(found, 1))
    stop = found[0]["text"][4]
    stopped = filled(filler, prefix="a", suffix="b", max_new_tokens=9, stop_strings=(stop,))[0][0]
    assert stopped["text"] == found[0]["text"].split(stop)[0]


def test_beams_fill_holes_too(filler):
    found, shown, _ = filled(filler, prefix="a", suffix="b", num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert len(found) == 2
    assert found[0]["score"] >= found[1]["score"]
    assert {(completion["prompt"], completion["suffix"]) for completion in found} == {("a", "b")}
    assert "a" + found[0]["text"] not in shown
    assert len(found[0]["logprobs"]) == len(found[0]["token_ids"]) == 6


def test_a_continued_prompt_has_no_suffix(filler):
    found, shown, _ = filled(filler, prompt="ab", max_new_tokens=3)
    assert found[0]["suffix"] is None
    assert shown == "ab" + found[0]["text"] + "\n"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"num_beams": 3}, {"prompt": "ab"}, {"prefix": "a"}])
def test_marks_of_a_hole_are_never_written_though_they_are_the_likeliest(filler, options):
    """In half of its documents such a model saw one begin."""
    found = filled(filler, max_new_tokens=30, **options)[0][0]
    assert max(found["token_ids"]) < PRE
    assert len(found["text"]) == 30
    assert all(top["id"] < PRE for token in found["logprobs"] for top in token["top_logprobs"])


# --- what does not fit ---


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.mark.parametrize(
    ("prefix", "suffix", "seen"),
    [
        (36, 36, (18, 17)),  # both too long: half each
        (36, 5, (30, 5)),  # a short one leaves its room to the other
        (5, 36, (5, 30)),
        (17, 18, (17, 18)),
        (0, 36, (0, 35)),
        (36, 0, (35, 0)),
    ],
)
def test_of_long_surroundings_the_model_sees_what_is_near_the_hole(monkeypatch, filler, prefix, suffix, seen):
    """Of a context of 48, three are marks and ten are for the middle."""
    given: list[list[int]] = []
    original = generate_tokens
    monkeypatch.setattr(
        "groundup.recipes.generate.generate_tokens",
        lambda model, prompts, *rest, **options: given.extend(prompts) or original(model, prompts, *rest, **options),
    )
    before, after = LETTERS[:prefix], LETTERS[::-1][:suffix]
    found, _, lines = filled(filler, prefix=before, suffix=after, max_new_tokens=10)
    assert given == [[PRE, SUF, *after.encode()[: seen[1]], MID, *before.encode()[prefix - seen[0] :]]]
    assert (found[0]["prompt"], found[0]["suffix"]) == (before, after)
    assert len(found[0]["token_ids"]) == 10
    if sum(seen) == prefix + suffix:
        assert lines == []
    else:
        assert lines == [
            f"prefix and suffix: {prefix + suffix} tokens, the model's context of 48 has room for 35 beside the hole; it sees "
            f"the last {seen[0]} of the prefix and the first {seen[1]} of the suffix"
        ]


def test_a_middle_ends_with_the_context(filler):
    """Beyond it the window would move on, away from the marks and the surroundings."""
    found, _, lines = filled(filler, prefix="a" * 20, suffix="b" * 10, max_new_tokens=100)
    # 48 tokens are read at most, and the last one that is written is not read.
    assert len(found[0]["token_ids"]) == 48 - 24 + 1
    assert lines[-1] == "max_new_tokens: 100, but the model's context has room for 25 in this hole"
    assert len(lines) == 2
    assert filled(filler, prefix="a", suffix="b", max_new_tokens=44)[2] == []


def test_a_context_of_a_few_tokens_does_not_fail(tmp_path):
    for n_positions in (1, 2, 3, 4, 5):
        small = save_filler(tmp_path / str(n_positions), n_positions)
        found = filled(small, prefix="abc", suffix="def", max_new_tokens=7)[0]
        assert 1 <= len(found[0]["token_ids"]) <= 3


# --- what cannot be asked ---


def test_a_model_without_the_marks_is_refused(tmp_path):
    plain = save_speaker(tmp_path)
    with pytest.raises(ConfigError) as error:
        filled(plain, prefix="a")
    assert str(error.value) == (
        f"prefix, suffix: {plain} has not learned to fill a hole, its tokenizer has no <|fim_prefix|>; give --prompt, or a "
        "model that was trained with --fim-rate"
    )


@pytest.mark.parametrize("hole", [{"prefix": "a"}, {"suffix": "a"}, {"prefix": "a", "suffix": "b"}])
def test_a_prompt_and_a_hole_are_refused(filler, tmp_path, hole):
    with pytest.raises(ConfigError, match=r"prompt: 'x' .*is continued at its end.* give one or the other"):
        filled(filler, prompt=("x",), **hole)
    # A file, before it is read.
    with pytest.raises(ConfigError, match=r"prompt_file: '.*absent' is continued at its end"):
        filled(filler, prompt_file=(str(tmp_path / "absent"),), **hole)


def test_from_python(filler):
    found = groundup.generate(filler, prefix="a", suffix="b", max_new_tokens=4, device="cpu")["completions"]
    assert (found[0]["suffix"], len(found[0]["token_ids"])) == ("b", 4)


# --- rows for new ids ---


@pytest.mark.parametrize("tied", [True, False])
def test_new_ids_get_the_mean_of_the_others(tied):
    model = new_model(GPT2Config(**vars(CONFIG) | {"tie_word_embeddings": tied})).float()
    grown = with_vocabulary(model, CONFIG.vocab_size + 5)
    assert grown.config == GPT2Config(**vars(model.config) | {"vocab_size": CONFIG.vocab_size + 5})
    before, after = model.state_dict(), grown.state_dict()
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) == (not tied)
    for name in after:
        old = before[name]
        assert torch.equal(after[name][: len(old)], old), name
        if name in ("wte.weight", "lm_head.weight"):
            mean = old.double().mean(0).expand(5, -1)
            assert torch.allclose(after[name][len(old) :].double(), mean, rtol=0, atol=1e-6), name
    ids = torch.randint(CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        was, now = model.logits(model(ids)), grown.logits(grown(ids))
    assert torch.allclose(now[..., : CONFIG.vocab_size], was, rtol=1e-5, atol=1e-5)
    # The mean of the rows scores as the mean of the scores, so never above the highest.
    assert torch.allclose(now[..., CONFIG.vocab_size :], was.mean(-1, keepdim=True).expand(-1, -1, 5), rtol=1e-4, atol=1e-4)
    # The old model is as it was, and the new one trains.
    assert model.config.vocab_size == CONFIG.vocab_size
    next_token_loss(grown(ids), grown.head_weight, ids + 5).backward()
    assert grown.wte.weight.grad is not None


def test_no_new_ids_change_nothing():
    model = new_model().float()
    assert all(map(torch.equal, with_vocabulary(model, CONFIG.vocab_size).state_dict().values(), model.state_dict().values()))


# --- it can be learned ---


@pytest.mark.slow
def test_a_model_learns_to_fill_holes(tmp_path):
    """Training and generation agree on what a hole looks like: the letters between two others, and no more."""
    texts = [ascii_lowercase[:24], ascii_uppercase[:24]]
    rows = np.array([[*text.encode(), END, *[PAD] * 8] for text in texts], dtype=np.int64)
    samples = FillInTheMiddle(InMemory(rows), BYTES, rate=0.8, spm_rate=0.5, seed=0)
    model = GPT2(GPT2Config(vocab_size=BYTES.vocab_size, n_positions=32, n_embd=64, n_layer=2, n_head=4))
    initialize(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(200):
        tokens = torch.from_numpy(samples.read(np.arange(16 * step, 16 * step + 16)))
        loss = next_token_loss(model(tokens[:, :-1]), model.head_weight, tokens[:, 1:]) / (16 * 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model, tmp_path, end_of_text_id=END)
    BYTES.save(tmp_path)
    holes = [(text, start, end) for text in texts for start in range(1, 24, 4) for end in range(start, 24, 5)]
    right = 0
    for text, start, end in holes:
        options = {"max_new_tokens": end - start + 1, "temperature": 0.0}
        found = filled(tmp_path, prefix=text[:start], suffix=text[end:], **options)[0][0]
        right += found["text"] == text[start:end] and found["finish_reason"] == "stop"
    # Where a prefix ends is the hardest to learn; by chance, of its 24 letters, one in hundreds would be right.
    assert right >= len(holes) / 3, (right, len(holes))
    assert filled(tmp_path, prompt="abc", temperature=0.0)[0][0]["text"] == texts[0][3:]
