"""groundup generate: text from a model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.config.load import Settings
from groundup.config.options import GenerationOptions, MachineOptions
from groundup.generation.generate import generate_tokens, readable
from groundup.generation.sampling import sampler
from groundup.recipes.loading import Loaded, load_checkpoint
from groundup.recipes.machine import machine_for
from groundup.runtime.device import explained_memory_errors

Say = Callable[[str], None]


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    """``stop`` at the end-of-text token, ``length`` at max_new_tokens."""


def generate(path: Path, settings: Settings, say: Say, stream: Say) -> dict[str, Any]:
    """
    Continue each prompt with a run's newest checkpoint, or a checkpoint.

    Args:
        stream: told every piece of text as soon as it is readable, the prompt first.

    Returns:
        What ``generate --json`` prints: completions (text, token_ids, finish_reason), tokens_per_second.
    """
    options = settings[GenerationOptions]
    loaded = load_checkpoint(path, say)
    machine = machine_for(settings[MachineOptions], training=False)
    loaded.model.to(machine.device)
    started = time.perf_counter()
    prompts = options.prompt or ("",)
    completions = []
    for prompt in prompts:
        stream(prompt)
        with explained_memory_errors():
            completions.append(complete(loaded, prompt, options, stream, machine.autocast))
        stream("\n")
    seconds = time.perf_counter() - started
    tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        "completions": [vars(completion) for completion in completions],
        "tokens_per_second": round(tokens / seconds, 1),
        "checkpoint": str(loaded.checkpoint),
    }


def complete(loaded: Loaded, prompt: str, options: GenerationOptions, stream: Say, autocast: Callable[[], Any]) -> Completion:
    """Continue one prompt; an empty one starts a new document."""
    tokenizer = loaded.tokenizer
    choose = sampler(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )  # fmt: skip
    ids: list[int] = []

    def kept() -> Any:
        for token in generate_tokens(
            loaded.model,
            tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text_id],
            choose,
            max_new_tokens=options.max_new_tokens,
            end_of_text_id=tokenizer.end_of_text_id,
            usable_ids=tokenizer.vocab_size,
            autocast=autocast,
        ):
            ids.append(token)
            yield token

    parts = []
    for text in readable(kept(), tokenizer.token_bytes):
        parts.append(text)
        stream(text)
    finished = ids and ids[-1] == tokenizer.end_of_text_id
    return Completion(prompt, "".join(parts), ids, "stop" if finished else "length")
