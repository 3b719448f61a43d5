"""groundup generate: text from a model."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from groundup.config.load import Settings
from groundup.config.options import GenerationOptions, MachineOptions, WeightsOptions
from groundup.errors import ConfigError
from groundup.evaluation.surprise import token_surprise
from groundup.generation.beam_search import EarlyStopping, beam_search
from groundup.generation.generate import generate_tokens
from groundup.generation.inference import for_inference
from groundup.generation.sampling import Sampler
from groundup.generation.text import TextStream
from groundup.recipes.loading import Loaded, load_checkpoint
from groundup.recipes.machine import machine_for
from groundup.recipes.texts import given_texts
from groundup.runtime.device import explained_memory_errors
from groundup.runtime.random import derive_seed
from groundup.tokenizer.special import fim_ids, usable_ids
from groundup.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]
Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Prompt:
    """What a model is given."""

    text: str
    ids: list[int]
    """At least one, at most a context of them."""
    suffix: str | None = None
    """The text after the hole, where there is one to fill."""


@dataclass
class Completion:
    """What a model wrote after a prompt, or into a hole."""

    prompt: str
    """Before a hole: its prefix."""
    suffix: str | None = None
    """The text after the hole; None where a prompt was continued."""
    text: str = ""
    """Without the prompt, or prefix and suffix, and without a stop string that ended it."""
    token_ids: list[int] = field(default_factory=list)
    """All tokens that were chosen, those of a stop string and of the end of the text too."""
    finish_reason: str = "length"
    """``stop`` at the end-of-text token or a stop string, ``length`` at max_new_tokens."""
    stop_string: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    """Per token: token (its text), bytes, id, logprob, and top_logprobs with the same of the likeliest ones."""
    score: float | None = None
    """Beam search: the log-probability after the length penalty."""


def generate(path: Path, settings: Settings, say: Say, stream: Say, *, logprobs: bool = True) -> dict[str, Any]:
    """
    Continue each prompt, or fill the hole between prefix and suffix, with a run's newest checkpoint, or a checkpoint.

    Args:
        stream: told every piece of text as soon as it is readable, completions in order; a prompt comes before its
            continuation, a hole's prefix and suffix do not, so that an editor can insert what comes.
        logprobs: whether to report log-probabilities, which takes a little time.

    Returns:
        What ``generate --json`` prints: completions (see ``Completion``), tokens_per_second, checkpoint.

    Raises:
        ConfigError: a prompt and a hole; or a hole for a model that has not learned to fill one.
    """
    options = settings[GenerationOptions]
    hole = bool(options.prefix or options.suffix)
    if hole and (options.prompt or options.prompt_file):
        name, text = ("prompt", options.prompt) if options.prompt else ("prompt_file", options.prompt_file)
        raise ConfigError(
            f"{name}: {text[0]!r} is continued at its end, --prefix and --suffix are text around a hole; give one or the other"
        )
    prompts = given_texts(options.prompt, options.prompt_file, "prompt_file")
    loaded = load_for_generation(path, settings, say)
    if not prompts and not hole:
        say("no prompt: this starts a new document (standard input is read by --prompt-file -)")
        prompts = [""]
    started = time.perf_counter()
    if hole:
        completions = fill(loaded, options, say, stream, logprobs=logprobs)
    else:
        completions = complete(loaded, prompts, options, say, stream, logprobs=logprobs)
    seconds = time.perf_counter() - started
    tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        "completions": [asdict(completion) for completion in completions],
        "tokens_per_second": round(tokens / seconds, 1),
        "checkpoint": str(loaded.checkpoint),
    }


def load_for_generation(path: Path, settings: Settings, say: Say) -> Loaded:
    """A run or checkpoint, its weights where and in what they will be computed."""
    loaded = load_checkpoint(path, say, settings[WeightsOptions].weights)
    machine = machine_for(settings[MachineOptions], training=False)
    with explained_memory_errors():
        for_inference(loaded.model, machine.device, machine.dtype)
    return loaded


def complete(
    loaded: Loaded, prompts: list[str], options: GenerationOptions, say: Say, stream: Say, *, logprobs: bool
) -> list[Completion]:
    """Continue prompts, each ``num_return_sequences`` times; an empty one starts a new document."""
    return _write(loaded, [Prompt(text, _prompt_ids(loaded, text, say)) for text in prompts], options, stream, logprobs)


def fill(loaded: Loaded, options: GenerationOptions, say: Say, stream: Say, *, logprobs: bool) -> list[Completion]:
    """
    Write what stands between ``prefix`` and ``suffix``, ``num_return_sequences`` times, in the order that ``fim_order`` names.

    A hole, its surroundings and what fills it are within one context, as they were in training: long surroundings are cut to
    what is near the hole.

    Raises:
        ConfigError: the model has not learned it.
    """
    prompt = Prompt(options.prefix, _hole_ids(loaded, options, say), options.suffix)
    most = max(1, loaded.model.config.n_positions - len(prompt.ids) + 1)
    limited = replace(options, max_new_tokens=min(options.max_new_tokens, most))
    completions = _write(loaded, [prompt], limited, stream, logprobs)
    if most < options.max_new_tokens and any(completion.finish_reason == "length" for completion in completions):
        say(f"max_new_tokens: {options.max_new_tokens:,}, but the model's context has room for {most:,} in this hole")
    return completions


def _write(loaded: Loaded, prompts: list[Prompt], options: GenerationOptions, stream: Say, logprobs: bool) -> list[Completion]:
    with explained_memory_errors():
        write = _search if options.num_beams > 1 else _sample
        return write(loaded, prompts, options, stream, logprobs)


def _hole_ids(loaded: Loaded, options: GenerationOptions, say: Say) -> list[int]:
    """Prefix and suffix between the marks of a hole; cut, where they are long, to leave half of the context to the middle."""
    marks = fim_ids(loaded.tokenizer)
    if marks is None:
        raise ConfigError(
            f"prefix, suffix: {loaded.checkpoint} has not learned to fill a hole, its tokenizer has no <|fim_prefix|>; give "
            "--prompt, or a model that was trained with --fim-rate"
        )
    context = loaded.model.config.n_positions
    prefix: list[int] = loaded.tokenizer.encode(options.prefix).tolist()
    suffix: list[int] = loaded.tokenizer.encode(options.suffix).tolist()
    room = max(0, context - 3 - min(options.max_new_tokens, context // 2))
    if (tokens := len(prefix) + len(suffix)) > room:
        after = min(len(suffix), max(room // 2, room - len(prefix)))
        prefix, suffix = prefix[len(prefix) - min(len(prefix), room - after) :], suffix[:after]
        say(
            f"prefix and suffix: {tokens:,} tokens, the model's context of {context:,} has room for {room:,} beside the hole; "
            f"it sees the last {len(prefix):,} of the prefix and the first {len(suffix):,} of the suffix"
        )
    if options.fim_order == "spm":
        return [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix]
    return [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle]


def _prompt_ids(loaded: Loaded, text: str, say: Say) -> list[int]:
    """Token ids of a prompt, at most a context of them: its end."""
    room = loaded.model.config.n_positions
    ids: list[int] = loaded.tokenizer.encode(text).tolist()
    if len(ids) > room:
        say(f"prompt {_shortened(text)!r}: {len(ids):,} tokens, the model's context is {room:,}; it sees the last {room:,}")
    return ids[-room:] or [loaded.tokenizer.end_of_text_id]


def _sample(loaded: Loaded, prompts: list[Prompt], options: GenerationOptions, stream: Say, logprobs: bool) -> list[Completion]:
    tokenizer, copies = loaded.tokenizer, options.num_return_sequences
    completions = [Completion(prompt.text, prompt.suffix) for prompt in prompts for _ in range(copies)]
    for completion in completions:
        completion.logprobs = [] if logprobs else None
    texts = [TextStream(tokenizer.token_bytes, options.stop_strings) for _ in completions]
    show = _InOrder(completions, stream)
    drawn = generate_tokens(
        loaded.model,
        [prompt.ids for prompt in prompts for _ in range(copies)],
        Sampler(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty),
        # Of the place among the completions of its own prompt, so that other prompts do not change it.
        seeds=[derive_seed(options.seed, "sample", copy) for _ in prompts for copy in range(copies)],
        max_new_tokens=options.max_new_tokens,
        end_of_text_id=tokenizer.end_of_text_id,
        usable_ids=usable_ids(tokenizer),
        batch_size=options.batch_size,
        top_logprobs=options.top_logprobs if logprobs else None,
        ended=lambda number: texts[number].stopped_by is not None,
    )
    for choice in drawn:
        number, completion = choice.prompt, completions[choice.prompt]
        completion.token_ids.append(choice.token)
        if completion.logprobs is not None:
            completion.logprobs.append(_token_facts(tokenizer, choice.token, choice.logprob, choice.top))
        piece = texts[number].add(choice.token)
        over = len(completion.token_ids) == options.max_new_tokens or choice.token == tokenizer.end_of_text_id
        if over or texts[number].stopped_by is not None:
            piece += texts[number].finish()
            _close(completion, texts[number], tokenizer)
            show.ended.add(number)
        show.add(number, piece)
    return completions


def _search(loaded: Loaded, prompts: list[Prompt], options: GenerationOptions, stream: Say, logprobs: bool) -> list[Completion]:
    tokenizer, completions = loaded.tokenizer, []

    def text_of(tokens: list[int]) -> TextStream:
        text = TextStream(tokenizer.token_bytes, options.stop_strings)
        for token in tokens:
            text.add(token)
        return text

    for prompt in prompts:
        hypotheses = beam_search(
            loaded.model,
            prompt.ids,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            end_of_text_id=tokenizer.end_of_text_id,
            length_penalty=options.length_penalty,
            early_stopping=cast("EarlyStopping", options.early_stopping),
            repetition_penalty=options.repetition_penalty,
            usable_ids=usable_ids(tokenizer),
            ended=lambda tokens: bool(options.stop_strings) and text_of(tokens).stopped_by is not None,
        )
        for hypothesis in hypotheses[: options.num_return_sequences]:
            completion = Completion(prompt.text, prompt.suffix, token_ids=hypothesis.tokens, score=hypothesis.score)
            text = text_of(hypothesis.tokens)
            text.finish()
            _close(completion, text, tokenizer)
            if logprobs:
                scored = token_surprise(
                    loaded.model, prompt.ids, hypothesis.tokens, top_logprobs=options.top_logprobs,
                    usable_ids=usable_ids(tokenizer),
                )  # fmt: skip
                completion.logprobs = [_token_facts(tokenizer, s.token, s.logprob, s.top) for s in scored]
            completions.append(completion)
    show = _InOrder(completions, stream)
    for number, completion in enumerate(completions):
        show.ended.add(number)
        show.add(number, completion.text)
    return completions


def _close(completion: Completion, text: TextStream, tokenizer: Tokenizer) -> None:
    completion.text, completion.stop_string = text.text, text.stopped_by
    if text.stopped_by is not None or completion.token_ids[-1] == tokenizer.end_of_text_id:
        completion.finish_reason = "stop"


def _token_facts(tokenizer: Tokenizer, token: int, logprob: float, top: Top) -> dict[str, Any]:
    likeliest = [{**spelling(tokenizer, i), "logprob": value} for i, value in top]
    return {**spelling(tokenizer, token), "logprob": logprob, "top_logprobs": likeliest}


def spelling(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token for people and for programs: its text, its bytes (a character may span several tokens), its id."""
    return {"token": tokenizer.spelled(token), "bytes": list(tokenizer.token_bytes[token]), "id": token}


class _InOrder:
    """Shows completions one after the other, though they are written together: the first open one live."""

    def __init__(self, completions: list[Completion], stream: Say):
        self._completions, self._stream = completions, stream
        self._waiting = [""] * len(completions)
        self._shown = self._pieces()
        self.ended: set[int] = set()

    def add(self, number: int, piece: str) -> None:
        """Take a new piece of a completion; show what is next."""
        self._waiting[number] += piece
        for text in self._shown:
            if text is None:
                return
            self._stream(text)

    def _pieces(self) -> Iterator[str | None]:
        """Text to show, in order; None while there is none."""
        for number, completion in enumerate(self._completions):
            if len(self._completions) > 1:
                yield f"--- {number + 1} of {len(self._completions)} ---\n"
            yield completion.prompt if completion.suffix is None else ""
            while True:
                text, self._waiting[number] = self._waiting[number], ""
                if text:
                    yield text
                elif number in self.ended:
                    break
                else:
                    yield None
            if len(self._completions) > 1 or completion.suffix is None:
                yield "\n"  # but what fills a single hole is exact


def _shortened(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:27]}…"
