"""The verbs that do something with a model: evaluate, generate, score, import, export."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from groundup.cli.command import CHECKPOINT, verb
from groundup.config.load import Settings
from groundup.config.options import EVALUATE_GROUPS, EXPORT_GROUPS, GENERATE_GROUPS, IMPORT_GROUPS, SCORE_GROUPS
from groundup.tracking.surprise import harmless


@verb(
    "evaluate",
    "Measure a model on validation text.\n\nEvery window once: loss, perplexity, bits per byte, token accuracy.",
    EVALUATE_GROUPS,
    [CHECKPOINT],
)
def _evaluate(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.evaluate import evaluate
    from groundup.tracking.progress import perplexity_text, progress

    with progress() as shown:
        result = evaluate(Path(own["checkpoint"]), settings, shown.say)
    return result, (
        f"{result['checkpoint']}: loss {result['eval_loss']:.4f} | perplexity {perplexity_text(result['perplexity'])} | "
        f"{result['bits_per_byte']:.4f} bits per byte | token accuracy {result['token_accuracy']:.2%} | "
        f"{result['tokens']:,} tokens"
        + "".join(
            f"\n  {name}: loss {part['eval_loss']:.4f} | perplexity {perplexity_text(part['perplexity'])} | "
            f"{part['bits_per_byte']:.4f} bits per byte | token accuracy {part['token_accuracy']:.2%}"
            for name, part in result.get("sources", {}).items()
        )
    )


@verb(
    "import",
    "Make a checkpoint from other people's weights.\n\nA SOURCE is a Hugging Face folder, OpenAI's GPT-2 folder, a state dict "
    "of nanoGPT, build-nanogpt or LLMs-from-scratch, or a .gguf file; openai:124M (355M, 774M, 1558M) and hf:OWNER/NAME "
    "are downloaded.",
    IMPORT_GROUPS,
    [click.Argument(["source"], metavar="SOURCE"), click.Argument(["target"], metavar="FOLDER")],
)
def _import(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.importing import import_model
    from groundup.tracking.progress import progress

    with progress() as shown:
        result = import_model(own["source"], Path(own["target"]), settings, shown.say)
    return result, (
        f"{result['checkpoint']}: {result['format']}, {result['parameters']:,} parameters, vocabulary "
        f"{result['vocab_size']:,}, context {result['n_positions']:,}\n"
        f'next: groundup generate {shlex.quote(result["checkpoint"])} --prompt "…"\n'
        f"      groundup train TEXT --init-from {shlex.quote(result['checkpoint'])} --output-dir RUN"
    )


@verb(
    "export",
    "Write a model for other programs.\n\nFor transformers, llama.cpp or OpenAI's own code; it is read back and compared.",
    EXPORT_GROUPS,
    [CHECKPOINT, click.Argument(["target"], metavar="PATH")],
)
def _export(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.exporting import export
    from groundup.tracking.progress import progress

    with progress() as shown:
        result = export(Path(own["checkpoint"]), Path(own["target"]), settings, shown.say)
    return result, (
        f"{result['path']}: {result['format']}, {result['dtype']}, {result['parameters']:,} parameters, "
        f"{result['bytes'] / 1e6:,.1f} MB"
    )


@verb(
    "generate",
    "Continue prompts, or ask for them.\n\nThe text streams as it comes. Without a prompt, at a terminal, a prompt sign waits "
    "for them.",
    GENERATE_GROUPS,
    [CHECKPOINT],
)
def _generate(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.config.options import GenerationOptions
    from groundup.recipes.converse import converse
    from groundup.recipes.generate import generate
    from groundup.tracking.progress import progress

    terminal = sys.stdout is not None and sys.stdout.isatty()

    def stream(text: str) -> None:
        if not own["json"] and sys.stdout is not None:
            sys.stdout.write(harmless(text) if terminal else text)
            sys.stdout.flush()

    path, options = Path(own["checkpoint"]), settings[GenerationOptions]
    with progress() as shown:
        filling = options.prefix or options.suffix
        if (
            not filling
            and not options.prompt
            and not options.prompt_file
            and not own["json"]
            and sys.stdin is not None
            and sys.stdin.isatty()
        ):
            converse(path, settings, shown.say, stream)
            return {}, ""
        result = generate(path, settings, shown.say, stream, logprobs=own["json"])
        if terminal and (options.prefix or options.suffix):
            stream("\n")
        shown.say(f"({sum(len(c['token_ids']) for c in result['completions'])} tokens, {result['tokens_per_second']} tok/s)")
    return result, ""


@verb(
    "score",
    "Show how surprising a text is.\n\nToken by token: coloured at a terminal, else a table.",
    SCORE_GROUPS,
    [CHECKPOINT],
)
def _score(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.score import score
    from groundup.tracking.progress import progress
    from groundup.tracking.surprise import show_surprise

    with progress() as shown:
        result = score(Path(own["checkpoint"]), settings, shown.say)
    if not own["json"]:
        for text in result["texts"]:
            show_surprise(text)
    return result, ""
