"""How a verb becomes a click command: its flags are generated from the declared options."""

import json
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

import click

from groundup import __version__
from groundup.config.declaration import AUTO
from groundup.config.load import Given, Settings, read_config_file, resolve
from groundup.config.options import COMMANDS, DOCTOR_GROUPS, TRAIN_GROUPS
from groundup.config.presets import PRESET_OPTIONS
from groundup.errors import ConfigError

ALL_NAMES = {declaration.name for groups in COMMANDS.values() for group in groups for declaration in fields(group)}
OF_TRAINING_ALONE = (("max_steps", 0), ("per_device_eval_batch_size", AUTO))
Run = Callable[[dict[str, Any], Settings], tuple[dict[str, Any], str]]

EXIT_CODES = """\b
Exit codes: 0 done, 1 doctor found a fault, 2 usage, 3 data, 4 checkpoint, 5 diverged, 6 out of disk or
memory, 75 stopped by a signal with a checkpoint saved (the same command goes on)."""


def _json(result: dict[str, Any]) -> str:
    """One line of JSON, in ASCII whatever the terminal speaks; numbers that are not finite become null."""
    return json.dumps(json.loads(json.dumps(result), parse_constant=lambda constant: None), allow_nan=False)


class ReaderGoneError(Exception):
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
    by_preset = declaration.name in PRESET_OPTIONS and groups in (TRAIN_GROUPS, DOCTOR_GROUPS)
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


def verb(name: str, help: str, groups: tuple[type, ...], arguments: list[click.Parameter]) -> Callable[[Run], Run]:
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
            if groups not in (TRAIN_GROUPS, DOCTOR_GROUPS):  # where no steps and a size found by itself are no values
                layers = {name: item for name, item in layers.items() if (name, item.value) not in OF_TRAINING_ALONE}
            layers |= {
                key: Given(value, f"--{key.replace('_', '-')}") for key, value in given.items() if value not in (None, ())
            }
            try:
                result, text = run({**own, "json": json_output}, resolve(groups, layers))
                if json_output or text:
                    print(_json(result) if json_output else text, flush=True)
            except BrokenPipeError:
                raise ReaderGoneError from None
            if result.get("passed") is False:
                raise click.exceptions.Exit(1)

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


def output_dir(default: str | None = None) -> click.Option:
    """The option that says where the result goes; it must be given where there is no default."""
    shown = "Where the result goes." + (f"  [default: {default}]" if default else "")
    # To click a default of None is a default.
    given: dict[str, Any] = {"default": default} if default else {"required": True}
    return _Option(["--output-dir"], **given, metavar="FOLDER", help=shown, section="Options")


SOURCES = click.Argument(["sources"], nargs=-1, metavar="SOURCE…")
CHECKPOINT = click.Argument(["checkpoint"], metavar="RUN_OR_CHECKPOINT")
