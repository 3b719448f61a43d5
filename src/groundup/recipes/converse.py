"""groundup generate without a prompt: type one, read the answer, change a setting, go on."""

import contextlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from groundup.config.load import Given, Settings, resolve, unknown_option_hint
from groundup.config.options import GENERATE_GROUPS, GenerationOptions
from groundup.errors import ConfigError, GroundupError
from groundup.recipes.generate import complete, load_for_generation

Say = Callable[[str], None]
HELP = """\
Type the beginning of a text; the model goes on from it. Ctrl-C stops an answer, Ctrl-D ends.
  /settings             what is set
  /NAME VALUE           change a setting, e.g. /temperature 0.5; /NAME default undoes it
  /help, /quit"""
# These make no sense for one prompt at a time.
NOT_HERE = ("prompt", "prompt_file", "prefix", "suffix", "top_logprobs", "batch_size")


def converse(path: Path, settings: Settings, say: Say, stream: Say, ask: Callable[[str], str] = input) -> None:
    """
    Answer prompts until the end of the input; the arrow keys bring earlier ones back.

    Each answer has a seed of its own, the next whole number, so that the same prompt twice gives two texts.

    Args:
        ask: shows a prompt sign and returns the line that was typed; EOFError ends, KeyboardInterrupt is a new line.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its history and its arrow keys

    loaded = load_for_generation(path, settings, say)
    options = settings[GenerationOptions]
    given = {
        name: Given(getattr(options, name), origin)
        for name, origin in settings.origins.items()
        if origin != "default" and hasattr(options, name) and name not in ("prompt", "prompt_file")
    }
    say(f"{loaded.checkpoint}: type a prompt, or /help")
    while True:
        try:
            line = ask("> ")
        except KeyboardInterrupt:
            stream("\n")
            continue
        except EOFError:
            stream("\n")
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if line[:1] == "/" and line[1:2] not in ("/", "*", ""):  # a comment in code is no command
            try:
                options, given = _command(line, options, given, say)
            except ConfigError as error:
                say(str(error))
            continue
        try:
            complete(loaded, [line], options, say, stream, logprobs=False)
        except KeyboardInterrupt:
            stream(" [stopped]\n")
        except GroundupError as error:
            say(str(error))
        options = replace(options, seed=options.seed + 1)


def _command(
    line: str, options: GenerationOptions, given: dict[str, Given], say: Say
) -> tuple[GenerationOptions, dict[str, Given]]:
    """Do what a line that begins with / says; returns the settings from now on."""
    name, _, value = line[1:].strip().partition(" ")
    name = name.replace("-", "_")
    if name == "help":
        say(HELP)
    elif name == "settings":
        say("\n".join(f"  {name} {getattr(options, name)}" for name in _names()))
    elif name not in _names():
        raise ConfigError(f"/{name}: no such command or setting{unknown_option_hint(name, _names()) or '; see /help'}")
    elif not value:
        say(f"  {name} {getattr(options, name)}")
    else:
        given = {other: item for other, item in given.items() if other != name}
        if value.strip() != "default":
            item: object = [part.strip() for part in value.split(",")] if name == "stop_strings" else value.strip()
            given[name] = Given(item, f"/{name}")
        if name == "num_beams" and value.strip() in ("1", "default"):
            given = {other: item for other, item in given.items() if other not in ("length_penalty", "early_stopping")}
        checked = resolve(GENERATE_GROUPS, given)[GenerationOptions]
        say(f"  {name} {getattr(checked, name)}")
        return replace(checked, seed=checked.seed if name == "seed" else options.seed), given
    return options, given


def _names() -> list[str]:
    return [declaration.name for declaration in fields(GenerationOptions) if declaration.name not in NOT_HERE]
