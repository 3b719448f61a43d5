"""generate without a prompt: through the function that asks, and at a terminal that the test plays."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import groundup
from groundup.config.load import Given, resolve
from groundup.config.options import GENERATE_GROUPS
from groundup.interop.huggingface import save_model
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.recipes.converse import converse
from groundup.tokenizer.tokenizer import byte_tokenizer

NEEDS_TERMINAL = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes lively printable ASCII without line breaks, and never ends by itself."""
    folder = tmp_path_factory.mktemp("converse")
    model = GPT2(GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False))
    initialize(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.ln_f.bias[0] = 10.0
        model.lm_head.weight[:, 0] = torch.tensor([0.0 if chr(i).isalpha() and i < 128 else -9.0 for i in range(257)])
    save_model(model, folder, end_of_text_id=256)
    byte_tokenizer().save(folder)
    return folder


class Conversation:
    """What was said, what was streamed, and the answers to each line that was typed."""

    def __init__(self, path: Path, lines: list[Any], stream: Callable[[str], None] | None = None, **options: Any):
        self.said: list[str] = []
        self.streamed: list[str] = []
        self.asked = 0
        self._lines = iter(lines)
        given = {"max_new_tokens": 6, "device": "cpu"} | options
        resolved = resolve(GENERATE_GROUPS, {name: Given(value, f"--{name}") for name, value in given.items()})
        converse(path, resolved, self.said.append, stream or self.streamed.append, self._ask)

    def _ask(self, sign: str) -> str:
        self.asked += 1
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    @property
    def answers(self) -> list[str]:
        return "".join(self.streamed).splitlines()


def single(path: Path, prompt: str, **options: Any) -> str:
    options = {"max_new_tokens": 6} | options
    return prompt + groundup.generate(path, prompt=prompt, device="cpu", **options)["completions"][0]["text"]


def test_answers_are_those_of_single_runs_and_the_seed_goes_up(model_folder):
    talk = Conversation(model_folder, ["the", "the", ""], seed=7)
    assert talk.answers == [single(model_folder, text, seed=seed) for text, seed in (("the", 7), ("the", 8), ("", 9))] + [""]
    assert talk.answers[0] != talk.answers[1]


def test_the_end_of_the_input_ends_it_and_so_do_quit_and_exit(model_folder):
    assert Conversation(model_folder, []).asked == 1
    for word in ("/quit", "/exit", " /quit "):
        assert Conversation(model_folder, [word, "the"]).asked == 1


def test_settings_are_shown_with_their_values(model_folder):
    talk = Conversation(model_folder, ["/settings"], temperature=0.25)
    shown = talk.said[-1].splitlines()
    assert "  temperature 0.25" in shown
    assert "  max_new_tokens 6" in shown
    assert not [line for line in shown if line.split()[0] in ("prompt", "prompt_file", "batch_size", "device")]
    assert talk.streamed == ["\n"]


def test_a_setting_can_be_shown_and_changed(model_folder):
    talk = Conversation(model_folder, ["/max_new_tokens", "/max-new-tokens 9", "/max_new_tokens", "the"], seed=1)
    assert talk.said[-3:] == ["  max_new_tokens 6", "  max_new_tokens 9", "  max_new_tokens 9"]
    assert talk.answers[0] == single(model_folder, "the", max_new_tokens=9, seed=1)


def test_what_was_set_before_stays_set(model_folder):
    talk = Conversation(model_folder, ["/temperature 2", "/top_k 7", "the"], seed=3, min_p=0.01)
    assert talk.answers[0] == single(model_folder, "the", temperature=2, top_k=7, seed=3, min_p=0.01)


def test_another_setting_leaves_the_seed_where_it_is_and_the_seed_can_be_set(model_folder):
    talk = Conversation(model_folder, ["one", "/top_k 7", "the", "/seed 3", "the"], seed=3)
    assert talk.answers[1:3] == [single(model_folder, "the", top_k=7, seed=seed) for seed in (4, 3)]


def test_stop_strings_can_be_several(model_folder):
    plain = single(model_folder, "the", temperature=0)
    talk = Conversation(model_folder, [f"/stop_strings {plain[5]}, {plain[6]}", "the"], temperature=0)
    assert talk.answers[0] == single(model_folder, "the", temperature=0, stop_strings=(plain[5], plain[6]))
    assert len(talk.answers[0]) < len(plain)


def test_beams_can_be_set_and_seen(model_folder):
    talk = Conversation(model_folder, ["/num_beams 3", "the"])
    assert talk.answers[0] == single(model_folder, "the", num_beams=3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temprature 1", "did you mean temperature?"),
        ("/?", "no such command or setting"),
        ("/temperature -1", "must be at least 0"),
        ("/temperature hot", "is not a number"),
        ("/top_p 0", "must be above 0"),
        ("/top_p 1.5", "must be at most 1"),
        ("/max_new_tokens 1.5", "is not a whole number"),
        ("/num_return_sequences 0", "must be at least 1"),
        ("/length_penalty 2", "acts on beams only"),
        ("/early_stopping maybe", "is not one of true, false, never"),
        ("/stop_strings ,", "is in every text"),
        ("/device cuda", "no such command or setting"),
        ("/prompt x", "no such command or setting"),
    ],
)
def test_a_wrong_name_or_value_is_said_and_changes_nothing(model_folder, line, words):
    talk = Conversation(model_folder, [line, "the"], seed=5)
    assert words in talk.said[-1]
    assert talk.said[-1].startswith(line.split()[0][:1]) or line.split()[0].strip("/") in talk.said[-1]
    assert talk.answers[0] == single(model_folder, "the", seed=5)


def test_help_names_the_commands(model_folder):
    talk = Conversation(model_folder, ["/help"])
    assert all(word in talk.said[-1] for word in ("/settings", "/NAME VALUE", "/quit", "Ctrl-C", "Ctrl-D"))


def test_beams_can_be_left_again(model_folder):
    """Settings that act on beams only must not stand in the way."""
    talk = Conversation(model_folder, ["/num_beams 3", "/length_penalty 2", "/early_stopping never", "/num_beams 1", "the"])
    assert not [line for line in talk.said if "acts on beams only" in line]
    assert talk.answers[0] == single(model_folder, "the")


def test_sampling_can_be_left_for_beams(model_folder):
    talk = Conversation(model_folder, ["/temperature 0", "/num_beams 3", "the"], temperature=0.5)
    assert talk.answers[0] == single(model_folder, "the", num_beams=3)


def test_settings_that_cannot_be_changed_here_are_kept(model_folder, monkeypatch):
    """The batch size that the command line gave is that of every answer."""
    from groundup.recipes import converse as module

    seen = []
    monkeypatch.setattr(module, "complete", lambda loaded, prompts, options, *rest, **named: seen.append(options.batch_size))
    Conversation(model_folder, ["one", "/temperature 1", "two"], batch_size=1)
    assert seen == [1, 1]


def test_ctrl_c_stops_one_answer_and_the_conversation_goes_on(model_folder):
    pieces: list[str] = []

    def stream(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    Conversation(model_folder, ["the", "and"], stream=stream, seed=1)
    text = "".join(pieces)
    whole = single(model_folder, "the", seed=1)
    assert text.startswith(whole[:6] + " [stopped]\n")
    assert single(model_folder, "and", seed=2) in text


def test_ctrl_c_at_the_prompt_is_a_new_line(model_folder):
    talk = Conversation(model_folder, [KeyboardInterrupt(), "the"], seed=1)
    assert talk.asked == 3
    assert talk.answers[:2] == ["", single(model_folder, "the", seed=1)]


def test_text_comes_token_by_token_without_line_breaks_between(model_folder):
    talk = Conversation(model_folder, ["the"], seed=1)
    assert [piece for piece in talk.streamed if piece] == ["the", *single(model_folder, "the", seed=1)[3:], "\n", "\n"]


def test_several_completions_of_one_prompt_are_all_shown(model_folder):
    talk = Conversation(model_folder, ["/num_return_sequences 2", "the"], seed=1)
    assert talk.answers[0] == "--- 1 of 2 ---"
    assert talk.answers[1] == single(model_folder, "the", seed=1)


def test_an_error_while_answering_is_said_and_the_conversation_goes_on(model_folder, tmp_path):
    from groundup.interop.huggingface import load_model

    model = load_model(model_folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # finite, but what they give is not
    save_model(model, tmp_path, end_of_text_id=256)
    byte_tokenizer().save(tmp_path)
    talk = Conversation(tmp_path, ["the", "and"])
    assert talk.asked == 3
    assert sum("not finite" in line for line in talk.said) == 2


# --- at a terminal ---

CODES = re.compile(r"\x1b(\[[?0-9;]*[A-Za-z]|[=>])")


class Terminal:
    """The command with a pseudo-terminal for its input and output."""

    def __init__(self, path: Path, *flags: str):
        import fcntl
        import pty
        import termios

        self._fd, child = pty.openpty()
        # Else the terminal, on Ctrl-C, may throw away what the command has written in answer to it.
        attributes = termios.tcgetattr(child)
        attributes[3] |= termios.NOFLSH
        termios.tcsetattr(child, termios.TCSANOW, attributes)

        def take_terminal() -> None:
            fcntl.ioctl(child, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "groundup", "generate", str(path), "--device", "cpu", *flags],
            stdin=child, stdout=child, stderr=child, start_new_session=True, preexec_fn=take_terminal, pass_fds=(child,),
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def until(self, words: str, seconds: float = 60) -> str:
        """Everything since the last call, up to and with these words."""
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"no {words!r} in {self.seen[-500:]!r}"
            if select.select([self._fd], [], [], left)[0]:
                try:
                    new = os.read(self._fd, 65536)
                except OSError:  # Linux says so at the end
                    new = b""
                assert new, f"ended without {words!r}: {self.seen[-500:]!r}"
                self.seen = CODES.sub("", self.seen + new.decode(errors="replace")).replace("\r\n", "\n")
        found, self.seen = self.seen[: self.seen.index(words) + len(words)], self.seen[self.seen.index(words) + len(words) :]
        return found

    def type(self, keys: str | bytes) -> None:
        os.write(self._fd, keys.encode() if isinstance(keys, str) else keys)

    def close(self) -> int:
        """The exit code; what is still running is ended."""
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return -1
        finally:
            os.close(self._fd)


@pytest.fixture
def at_terminal(model_folder: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*flags: str) -> Terminal:
        opened.append(Terminal(model_folder, *flags))
        return opened[-1]

    yield start
    for terminal in opened:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
            terminal.process.wait()


@pytest.mark.slow
@NEEDS_TERMINAL
def test_a_conversation_at_a_terminal(at_terminal, model_folder):
    terminal = at_terminal("--max-new-tokens", "30", "--seed", "3")
    assert "type a prompt, or /help" in terminal.until("> ")
    terminal.type("/settings\n")
    assert "  temperature 0.8\n" in terminal.until("> ")
    terminal.type("/temperature 1.5\n/tempo 1\n")
    terminal.until("> ")
    assert "/tempo: no such command or setting" in terminal.until("> ")
    answers = []
    for seed in (3, 4):
        terminal.type("the\n")
        terminal.until("the\n")  # the line that was typed
        answers.append(terminal.until("> "))
        assert answers[-1] == single(model_folder, "the", temperature=1.5, seed=seed, max_new_tokens=30) + "\n> "
    assert answers[0] != answers[1]
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.mark.slow
@NEEDS_TERMINAL
def test_ctrl_c_at_a_terminal_stops_one_answer_only(at_terminal, model_folder):
    terminal = at_terminal("--max-new-tokens", "10000000", "--temperature", "0")
    terminal.until("> ")
    terminal.type("the\n")
    terminal.until("the\n")
    terminal.until(single(model_folder, "the", temperature=0, max_new_tokens=40))
    terminal.type("\x03")
    assert "\n" not in terminal.until(" [stopped]\n")[:-1]
    terminal.until("> ")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.3)  # Python's readline misses a signal that comes while it takes a key
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("/max_new_tokens 4\nand\n")
    terminal.until("and\n")
    assert terminal.until("> ") == single(model_folder, "and", temperature=0, max_new_tokens=4) + "\n> "
    terminal.type("/quit\n")
    assert terminal.close() == 0


@pytest.mark.slow
@NEEDS_TERMINAL
def test_bytes_that_are_no_text_do_not_end_a_conversation(at_terminal):
    terminal = at_terminal("--max-new-tokens", "4")
    terminal.until("> ")
    terminal.type(b"caf\xe9\n")  # a terminal that speaks Latin-1
    time.sleep(1)
    terminal.type("/settings\n")
    assert "internal error" not in terminal.until("num_beams")
    terminal.type("/quit\n")
    assert terminal.close() == 0


@pytest.mark.slow
@NEEDS_TERMINAL
def test_a_prompt_at_a_terminal_is_completed_without_asking(at_terminal, model_folder):
    terminal = at_terminal("--prompt", "the", "--max-new-tokens", "30")
    text = terminal.until(" tok/s)\n")
    assert single(model_folder, "the", max_new_tokens=30) + "\n" in text
    assert terminal.close() == 0
