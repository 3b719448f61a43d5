"""The token view's answers: they are what `groundup generate` draws from and what `groundup score` measures."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import groundup
from groundup.checkpoint.commit import checkpoints
from groundup.config.load import Given, resolve
from groundup.config.options import MachineOptions, WeightsOptions
from groundup.errors import CheckpointError, ConfigError
from groundup.generation.next_token import next_logits
from groundup.generation.sampling import Sampler
from groundup.recipes.token_view import BARS, LONGEST_TEXT, MOST_WRITTEN, TokenView
from groundup.tracking.labels import token_label, visible
from tests.conftest import TINY
from tests.runs import prepared

pytestmark = pytest.mark.usefixtures("quick")

SHARP = TINY | {"learning_rate": 0.02, "max_steps": 24, "eval_steps": 0, "save_steps": 12, "sample_tokens": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes that has learned a little, so that its probabilities differ."""
    run = tmp_path_factory.mktemp("watched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundup.recipes.train.draw_curves", lambda *arguments: None)
        groundup.train(prepared(tmp_path_factory, words=400), run, **SHARP)
    return run


def view_of(run: Path, said: list[str] | None = None) -> TokenView:
    settings = resolve((WeightsOptions, MachineOptions), {"device": Given("cpu", "test")})
    return TokenView(run, settings, torch.get_num_threads(), ([] if said is None else said).append)


@pytest.fixture
def view(run: Path) -> TokenView:
    return view_of(run)


def ids(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["written"]]


def stepped(view: TokenView, steps: int, **asked: Any) -> list[int]:
    """The tokens that one gets by asking for one more again and again."""
    written: list[int] = []
    for _ in range(steps):
        answer = view.next({**asked, "written": written, "draw": True})
        written = ids(answer)
        if answer["ended"]:
            break
    return written


SETTINGS = [
    {},
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 0, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prompt", ["", "the model learns a token from text and then it wri"], ids=len)
def test_drawing_one_by_one_writes_what_generate_writes(run, view, settings, prompt):
    """Also beyond the context of 16, which the longer prompt fills at once."""
    expected = groundup.generate(run, prompt=prompt, max_new_tokens=20, seed=3, device="cpu", top_logprobs=0, **settings)
    assert stepped(view, 20, prompt=prompt, seed=3, **settings) == expected["completions"][0]["token_ids"]


def test_without_filters_the_bars_are_the_probabilities_that_generate_reports(run, view):
    expected = groundup.generate(
        run, prompt="the ", max_new_tokens=1, temperature=1.0, top_k=0, top_logprobs=BARS, device="cpu"
    )["completions"][0]["logprobs"][0]["top_logprobs"]  # fmt: skip
    found = view.next({"prompt": "the ", "temperature": 1, "top_k": 0})
    assert [bar["id"] for bar in found["likeliest"]] == [top["id"] for top in expected]
    probabilities = torch.tensor([top["logprob"] for top in expected]).exp()
    for name in ("probability", "drawn"):
        torch.testing.assert_close(torch.tensor([bar[name] for bar in found["likeliest"]]), probabilities)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bars_are_how_often_tokens_are_drawn(run, view, settings):
    """2,000 draws of the sampler: each share is within five standard deviations, and what is out is never drawn."""
    loaded = groundup.load(run)
    prompt = loaded.tokenizer.encode("the mod").tolist()
    [logits] = next_logits(loaded.model, prompt)
    options = {"temperature": 0.8, "top_k": 50} | settings
    sampler, generator, draws = Sampler(**options), torch.Generator().manual_seed(0), 2000
    drawn = torch.tensor([sampler.draw(logits, generator, torch.tensor(prompt)) for _ in range(draws)])
    shares = torch.bincount(drawn, minlength=257) / draws
    found = view.next({"prompt": "the mod", **settings})
    for bar in found["likeliest"]:
        p = bar["drawn"]
        assert abs(float(shares[bar["id"]]) - p) <= 5 * (p * (1 - p) / draws) ** 0.5, bar
    assert found["left"] >= len(drawn.unique())


def test_all_probabilities_together_are_one_before_and_after(view):
    for settings in SETTINGS:
        found = view.next({"prompt": "a token", **settings})
        for name in ("probability", "drawn"):
            assert sum(bar[name] for bar in found["likeliest"]) + found["rest"][name] == pytest.approx(1, abs=1e-5)
        assert found["rest"]["tokens"] == found["vocab_size"] - BARS
        assert found["left"] == sum(bar["drawn"] > 0 for bar in found["likeliest"]) + found["rest"]["left"]


def test_a_filter_takes_tokens_out_and_says_how_many_are_left(view):
    assert view.next({"prompt": "the", "top_k": 7})["left"] == 7
    assert view.next({"prompt": "the", "top_k": 0})["left"] == 257
    greedy = view.next({"prompt": "the", "temperature": 0})
    assert greedy["left"] == 1
    assert greedy["likeliest"][0]["drawn"] == 1
    assert greedy["entropy_bits_drawn"] == 0
    assert greedy["entropy_bits"] > 0


def test_a_step_back_and_forward_gives_the_same_text(view):
    asked = {"prompt": "it writes ", "seed": 5, "temperature": 1.2, "top_k": 0}
    whole = stepped(view, 12, **asked)
    again = whole[:5]
    while len(again) < 12:
        again = ids(view.next({**asked, "written": again, "draw": True}))
    assert again == whole
    assert stepped(view, 12, **{**asked, "seed": 6}) != whole


def test_a_token_chosen_by_hand_is_part_of_the_text(view):
    found = view.next({"prompt": "", "written": list(b"the mo")})
    assert found["text"] == "the mo"
    assert [token["label"] for token in found["written"]] == ["t", "h", "e", "␣", "m", "o"]
    # What follows depends on the tokens, not on who wrote them.
    other = view.next({"prompt": "the", "written": list(b" mo")})
    assert other["likeliest"] == view.next({"prompt": "the mo"})["likeliest"]
    assert other["likeliest"] != view.next({"prompt": "the"})["likeliest"]


def test_the_name_of_a_special_token_in_a_prompt_is_text(view):
    assert view.next({"prompt": "<|endoftext|>"})["prompt_tokens"] == len("<|endoftext|>")


def test_pieces_of_characters_have_labels_and_text_waits_for_the_whole(view):
    halves = list("日".encode())
    found = view.next({"prompt": "", "written": halves[:2]})
    assert [token["label"] for token in found["written"]] == ["⟨E6⟩", "⟨97⟩"]
    assert found["text"] == "\ufffd"
    assert view.next({"prompt": "", "written": halves})["text"] == "日"


def test_the_end_of_a_text_is_said(view, run):
    end = groundup.load(run).tokenizer.end_of_text_id
    found = view.next({"prompt": "a", "written": [end]})
    assert found["ended"]
    assert found["written"][0]["label"] == "<|endoftext|>"


def test_a_prompt_longer_than_the_context_keeps_its_end_as_generate_does(view):
    found = view.next({"prompt": "x" * 10 + "the model learns"})
    assert (found["prompt_tokens"], found["prompt_tokens_cut"]) == (16, 10)
    assert found["likeliest"] == view.next({"prompt": "the model learns"})["likeliest"]


# --- surprise ---


def test_surprise_is_what_score_says(run, view):
    text = "the model naïve 日本 \x1b[2J"
    expected = groundup.score(run, text=text, device="cpu", top_logprobs=5)["texts"][0]
    found = view.text({"text": text})
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == expected[name]
    assert [token["bits"] for token in found["tokens"]] == [token["bits"] for token in expected["tokens"]]
    assert [[top["id"] for top in token["top"]] for token in found["tokens"]] == [
        [top["id"] for top in token["top_logprobs"]] for token in expected["tokens"]
    ]
    # Each character once, with as many tokens as it has bytes, and nothing that a screen would obey.
    assert [piece["text"] for piece in found["pieces"]] == [*"the model naïve 日本 ", "⟨U+001B⟩", *"[2J"]
    assert sum(piece["tokens"] for piece in found["pieces"]) == len(found["tokens"]) == len(text.encode())
    assert next(piece["tokens"] for piece in found["pieces"] if piece["text"] == "日") == 3


# --- which model ---


def test_without_a_checkpoint_it_says_what_it_waits_for(tmp_path):
    view = view_of(tmp_path)
    assert "no checkpoint yet" in view.next({})["waiting"]
    assert "no checkpoint yet" in view.text({"text": "a"})["waiting"]


def test_the_newest_checkpoint_is_opened_once_and_again_when_there_is_a_newer_one(run, tmp_path, monkeypatch):
    import groundup.recipes.token_view as module

    opened, really = [], module.load_for_generation
    monkeypatch.setattr(module, "load_for_generation", lambda path, *more: (opened.append(path.name), really(path, *more))[1])
    older, newer = checkpoints(run)
    shutil.copytree(older, tmp_path / older.name)
    view = view_of(tmp_path)
    first = view.next({"prompt": "the"})
    assert view.next({"prompt": "the"}) == first
    assert view.text({"text": "the"})["checkpoint"] == first["checkpoint"] == older.name
    shutil.copytree(newer, tmp_path / newer.name)
    second = view.next({"prompt": "the"})
    assert (second["checkpoint"], second["step"]) == (newer.name, 24)
    assert second["likeliest"] != first["likeliest"], "not what was kept of the older one"
    shutil.rmtree(tmp_path / older.name)  # as save_total_limit does
    assert view.next({"prompt": "the"}) == second
    assert opened == [older.name, newer.name]


def test_a_damaged_checkpoint_is_reported_once_and_an_older_one_answers(run, tmp_path):
    for checkpoint in checkpoints(run):
        shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    damaged = tmp_path / checkpoints(run)[-1].name / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\0")
    said: list[str] = []
    view = view_of(tmp_path, said)
    assert view.next({})["step"] == 12
    assert view.next({})["step"] == 12
    assert len(said) == 1
    assert "checkpoint-24" in said[0]


def test_where_no_checkpoint_is_good_it_says_why(run, tmp_path):
    shutil.copytree(checkpoints(run)[0], tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12" / "model.safetensors").write_bytes(b"")
    view = view_of(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="model.safetensors"):
            view.next({})


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_no_error(run, tmp_path, monkeypatch):
    import groundup.recipes.token_view as module

    for checkpoint in checkpoints(run):
        shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    really = module.load_for_generation

    def deleted(path: Path, *more: Any) -> Any:
        if path.name == "checkpoint-24":
            shutil.rmtree(path)
        return really(path, *more)

    monkeypatch.setattr(module, "load_for_generation", deleted)
    said: list[str] = []
    assert view_of(tmp_path, said).next({})["step"] == 12
    assert said == []


# --- what is refused ---


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompt": 5}, "prompt: is not text"),
        ({"prompt": "x" * (LONGEST_TEXT + 1)}, "give at most"),
        ({"prompt": "\ud800"}, "half a character"),
        ({"written": "abc"}, "not a list"),
        ({"written": [1.5]}, "not a list"),
        ({"written": [True]}, "not a list"),
        ({"written": [-1]}, "not a list"),
        ({"written": [257]}, "257 or more"),
        ({"written": [10**30]}, "257 or more"),
        ({"written": [1] * (MOST_WRITTEN + 1)}, "give at most"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"seed": None}, "seed"),
        ({"seed": {}}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used_is_refused_in_one_line(view, asked, words):
    with pytest.raises(ConfigError) as caught:
        view.next(asked)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", None, 3, ["a"], "\udfff", "x" * (LONGEST_TEXT + 1)], ids=lambda value: repr(value)[:20])
def test_a_text_that_cannot_be_looked_at_is_refused(view, text):
    with pytest.raises(ConfigError, match="^text: "):
        view.text({"text": text})


def test_the_longest_generation_ends_there(view):
    found = view.next({"written": [97] * MOST_WRITTEN, "draw": True})
    assert found["full"]
    assert len(found["written"]) == MOST_WRITTEN


# --- labels ---


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b" the", "␣the"), (b"\n\n\t", "↵↵⇥"), (b"\xe6\x97", "⟨E6⟩⟨97⟩"), (b"a\xff", "a⟨FF⟩"), ("日".encode(), "日"),
        (b"\x00", "⟨U+0000⟩"), (b"\x1b[2J", "⟨U+001B⟩[2J"), ("\u202e".encode(), "⟨U+202E⟩"), ("\u200b".encode(), "⟨U+200B⟩"),
        ("\u2028".encode(), "⟨U+2028⟩"), ("\ue000".encode(), "⟨U+E000⟩"), (b"<b>", "<b>"), (b"\r", "␍"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_label_shows_every_byte(content, label):
    assert token_label(content) == label


def test_a_special_token_is_called_by_its_name():
    assert token_label(b"", "<|endoftext|>") == "<|endoftext|>"
    assert token_label(b"", "") == "⟨empty⟩"


def test_text_keeps_its_line_breaks_and_joiners():
    assert visible("a\n\tb\u200dc\u0301") == "a\n\tb\u200dc\u0301"
