"""
The command line: verbs to recipes. Flags are generated from the declared options; recipes are imported when called.

Progress and errors go to standard error; standard output holds the result, with ``--json`` one object and nothing else.
"""

import contextlib
import errno
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

import click

from groundup import __version__
from groundup.config.declaration import AUTO
from groundup.config.load import Given, Settings, read_config_file, resolve
from groundup.config.options import (
    COMMANDS,
    EVALUATE_GROUPS,
    EXPORT_GROUPS,
    GENERATE_GROUPS,
    IMPORT_GROUPS,
    PREPARE_GROUPS,
    SCHEDULE_GROUPS,
    SCORE_GROUPS,
    TRAIN_GROUPS,
)
from groundup.config.presets import PRESET_OPTIONS
from groundup.errors import ConfigError, GroundupError
from groundup.tracking.surprise import harmless

ALL_NAMES = {declaration.name for groups in COMMANDS.values() for group in groups for declaration in fields(group)}
OF_TRAINING_ALONE = (("max_steps", 0), ("per_device_eval_batch_size", AUTO))
LONGEST_LINE = 2000
"""Characters of an error: it may quote what a file says."""
Run = Callable[[dict[str, Any], Settings], tuple[dict[str, Any], str]]

EXIT_CODES = """\b
Exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 diverged, 6 out of disk or
memory, 75 stopped by a signal with a checkpoint saved (the same command goes on)."""


def main() -> None:
    """The ``groundup`` command."""
    # A closed stream must not make what belongs there go elsewhere.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code. Errors are one line each, a traceback only with ``--debug``."""
    try:
        cli.main(arguments, prog_name="groundup", standalone_mode=False)
        return 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _explain(error)
    except (KeyboardInterrupt, click.Abort):
        print("groundup: interrupted", file=sys.stderr)
        return 130


def _explain(error: Exception) -> int:
    """Print an error for a person; returns the exit code."""
    if isinstance(error, BrokenPipeError | _ReaderGoneError):
        # The reader of standard output has gone (`| head`); Python must not complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, GroundupError):
        # A configuration lists its problems; elsewhere a line break can only come from a file's name.
        lines = str(error).split("\n") if isinstance(error, ConfigError) else [str(error).replace("\n", "\\n")]
        code = error.exit_code
    elif isinstance(error, click.Abort):
        lines, code = ["interrupted"], 130
    elif isinstance(error, click.exceptions.NoArgsIsHelpError):
        print(error.format_message(), file=sys.stderr)
        return 2
    elif isinstance(error, click.ClickException):
        command = getattr(getattr(error, "ctx", None), "command_path", "groundup")
        lines, code = [f"{' '.join(error.format_message().split())} ({command} --help lists the options)"], 2
    elif isinstance(error, MemoryError):
        lines, code = ["out of memory: give smaller input, or a machine with more"], 6
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        lines, code = [f"no space left for the output ({error.strerror}); free some"], 6
    else:
        lines, code = [f"internal error: {type(error).__name__}: {error} (run again with --debug for the traceback)"], 1
    for line in lines:
        print(f"groundup: {harmless(line[:LONGEST_LINE])}", file=sys.stderr)
    return code


def _json(result: dict[str, Any]) -> str:
    """One line of JSON, in ASCII whatever the terminal speaks; numbers that are not finite become null."""
    return json.dumps(json.loads(json.dumps(result), parse_constant=lambda constant: None), allow_nan=False)


class _ReaderGoneError(Exception):
    """The reader of standard output has gone; click would take the system's own error for itself."""


class _Command(click.Command):
    """A command whose help lists options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the title of their group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=34)


class _Option(click.Option):
    """An option that knows its section."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section = section


@click.group(
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Pre-train GPT-2-style language models from the ground up: raw text or code in, a model that writes out.\n\n"
    "First run, on a laptop:  groundup train python-stdlib --output-dir run --max-steps 300",
)
@click.version_option(__version__, "--version", message="groundup %(version)s")
def cli() -> None:
    """Dispatch to a verb."""


def _flag(declaration: Field[Any], hint: Any, group: type, groups: tuple[type, ...]) -> click.Option:
    """The flag of a declared option of a command. Values stay text: ``config.load`` converts them, wherever they come from."""
    rules, name = declaration.metadata, declaration.name.replace("_", "-")
    section = (group.__doc__ or "").rstrip(".")
    by_preset = declaration.name in PRESET_OPTIONS and groups is TRAIN_GROUPS
    default = "by the preset" if by_preset else declaration.default
    default = "by itself" if default is None else default
    shown = "" if default in ((), "") else f"  [default: {default}]"
    unit = {int: "INTEGER", float: "NUMBER"}.get(hint, "TEXT")
    many = len(rules["choices"]) >= 5
    names = f" One of {', '.join(rules['choices'])}." if many else ""
    common: dict[str, Any] = {"help": rules["help"] + names + shown, "section": section, "default": None}
    if hint is bool or hint == bool | None:
        return _Option([f"--{name}/--no-{name}"], **common)
    measure = (rules["unit"] or unit).upper().replace(" ", "-")
    numbers = (measure,) if isinstance(declaration.default, int) else ()
    metavar = "|".join((*rules["choices"], *numbers)) if rules["choices"] and not many else measure
    return _Option([f"--{name}"], metavar=metavar, multiple=hint == tuple[str, ...], **common)


def _verb(name: str, help: str, groups: tuple[type, ...], arguments: list[click.Parameter]) -> Callable[[Run], Run]:
    """Register a recipe as a command with the options of its groups."""

    def register(run: Run) -> Run:
        def callback(config: str | None, json_output: bool, debug: bool, **given: Any) -> None:
            own = {parameter.name: given.pop(str(parameter.name)) for parameter in arguments}
            layers = read_config_file(Path(config)) if config else {}
            if "sources" in layers:
                from_file = layers.pop("sources").value
                from_file = [from_file] if isinstance(from_file, str) else from_file
                if not isinstance(from_file, list) or not all(isinstance(source, str) for source in from_file):
                    raise ConfigError(f"sources: {from_file!r} (from file {config}) is not a list of texts")
                own["sources"] = own.get("sources") or from_file
            # A run's config.toml holds the options of every command: those of others are not for this one.
            own_names = {declaration.name for group in groups for declaration in fields(group)}
            layers = {name: item for name, item in layers.items() if name in own_names or name not in ALL_NAMES}
            if groups is not TRAIN_GROUPS:  # where no steps and a size found by itself are no values
                layers = {name: item for name, item in layers.items() if (name, item.value) not in OF_TRAINING_ALONE}
            layers |= {
                key: Given(value, f"--{key.replace('_', '-')}") for key, value in given.items() if value not in (None, ())
            }
            try:
                result, text = run({**own, "json": json_output}, resolve(groups, layers))
                if json_output or text:
                    print(_json(result) if json_output else text, flush=True)
            except BrokenPipeError:
                raise _ReaderGoneError from None

        parameters: list[click.Parameter] = [*arguments]
        for group in groups:
            hints = get_type_hints(group)
            parameters += [_flag(item, hints[item.name], group, groups) for item in fields(group)]
        parameters += [
            _Option(["--config"], metavar="FILE", help="Read options from a TOML file; flags win.", section="General"),
            _Option(["--json", "json_output"], is_flag=True, help="Print one JSON object.", section="General"),
            _Option(["--debug"], is_flag=True, help="Show the traceback of an error.", section="General"),
        ]
        settings = {
            "help_option_names": ["-h", "--help"],
            "max_content_width": 110,
            "token_normalize_func": lambda token: token.replace("_", "-"),
        }
        cli.add_command(_Command(name, callback=callback, params=parameters, help=help, context_settings=settings))
        return run

    return register


def _output_dir() -> click.Option:
    return _Option(["--output-dir"], required=True, metavar="FOLDER", help="Where the result goes.", section="Options")


_SOURCES = click.Argument(["sources"], nargs=-1, metavar="SOURCE…")
_CHECKPOINT = click.Argument(["checkpoint"], metavar="RUN_OR_CHECKPOINT")


@_verb(
    "prepare",
    "Turn text into a tokenizer and shards of tokens.\n\nA SOURCE is a file (any UTF-8 text; .jsonl, .csv and .parquet with "
    "a text column; .gz and .zst of them), a folder, - for standard input, or python-stdlib. --source gives them names and "
    "weights.",
    PREPARE_GROUPS,
    [_SOURCES, _output_dir()],
)
def _prepare(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.prepare import prepare_dataset, summary
    from groundup.tracking.progress import progress

    with progress() as shown:
        dataset = prepare_dataset(own["sources"], Path(own["output_dir"]), settings, shown.say)
    return summary(
        dataset
    ), f"{dataset.directory}: ready; train on it with `groundup train {shlex.quote(str(dataset.directory))} --output-dir RUN`"


@_verb(
    "train",
    "Train a GPT-2 on text, or on a prepared dataset.\n\nThe same command again goes on where the run stopped, bit for bit. "
    "Ctrl-C saves first.",
    TRAIN_GROUPS,
    [_SOURCES, _output_dir()],
)
def _train(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']} (from the environment): this version trains in one process; start it "
            "without torchrun"
        )
    from groundup.recipes.train import train
    from groundup.tracking.progress import duration, progress

    output = Path(own["output_dir"])
    with progress() as shown:
        result = train(own["sources"], output, settings, shown)
    loss = "" if result["eval_loss"] is None else f", validation loss {result['eval_loss']:.4f}"
    run = shlex.quote(str(output))
    text = f"done: {result['steps']:,} steps in {duration(result['seconds'])}{loss}\n"
    as_it_is = " (transformers opens it as it is)" if _is_gpt2(result["final_checkpoint"]) else ""
    text += f"checkpoint: {result['final_checkpoint']}{as_it_is}\n"
    text += f"curves: {output / 'loss.png'}, {output / 'perplexity.png'}\n"
    return result, text + f'next: groundup generate {run} --prompt "…"'


def _is_gpt2(checkpoint: str) -> bool:
    return bool(json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2")


@_verb(
    "evaluate",
    "Measure a model on validation text.\n\nEvery window once: loss, perplexity, bits per byte, token accuracy.",
    EVALUATE_GROUPS,
    [_CHECKPOINT],
)
def _evaluate(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.evaluate import evaluate
    from groundup.tracking.progress import progress

    with progress() as shown:
        result = evaluate(Path(own["checkpoint"]), settings, shown.say)
    return result, (
        f"{result['checkpoint']}: loss {result['eval_loss']:.4f} | perplexity {result['perplexity']:,.2f} | "
        f"{result['bits_per_byte']:.4f} bits per byte | token accuracy {result['token_accuracy']:.2%} | "
        f"{result['tokens']:,} tokens"
        + "".join(
            f"\n  {name}: loss {part['eval_loss']:.4f} | perplexity {part['perplexity']:,.2f} | "
            f"{part['bits_per_byte']:.4f} bits per byte | token accuracy {part['token_accuracy']:.2%}"
            for name, part in result.get("sources", {}).items()
        )
    )


@_verb(
    "schedule",
    "Draw learning-rate schedules, without training.\n\nNAMEs are those of --lr-scheduler-type, which is drawn where none is "
    "given.",
    SCHEDULE_GROUPS,
    [click.Argument(["names"], nargs=-1, metavar="NAME…")],
)
def _schedule(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.schedule import draw_named
    from groundup.tracking.schedule_picture import schedule_text

    result = draw_named(own["names"], settings)
    return result, f"{schedule_text(result)}\npicture: {result['picture']}"


@_verb(
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


@_verb(
    "export",
    "Write a model for other programs.\n\nFor transformers, llama.cpp or OpenAI's own code; it is read back and compared.",
    EXPORT_GROUPS,
    [_CHECKPOINT, click.Argument(["target"], metavar="PATH")],
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


@_verb(
    "generate",
    "Continue prompts, or ask for them.\n\nThe text streams as it comes. Without a prompt, at a terminal, a prompt sign waits "
    "for them.",
    GENERATE_GROUPS,
    [_CHECKPOINT],
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


@_verb(
    "score",
    "Show how surprising a text is.\n\nToken by token: coloured at a terminal, else a table.",
    SCORE_GROUPS,
    [_CHECKPOINT],
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
