"""
Parse, validate and freeze options, once.

Layers, the later winning: the defaults, the preset named by ``model``, a config file, flags or Python arguments. Each
value remembers where it came from, and all problems come back in one error.
"""

import difflib
import math
import operator
import tomllib
import types
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from groundup.config.numbers import whole_number
from groundup.config.presets import FINE_TUNING, PRESETS
from groundup.config.ramp import Ramp, ends
from groundup.config.rules import contradictions
from groundup.errors import ConfigError

Group = TypeVar("Group")


@dataclass(frozen=True)
class Given:
    """A value that somebody gave, and where."""

    value: object
    origin: str


@dataclass(frozen=True)
class Settings:
    """Frozen option groups, and where each value came from (a flag, a file, a preset, or the default)."""

    groups: Mapping[type, Any]
    origins: Mapping[str, str]

    def __getitem__(self, group: type[Group]) -> Group:
        """The frozen options of one group."""
        found: Group = self.groups[group]
        return found

    def flat(self) -> dict[str, Any]:
        """All options by name, in the order of their declaration."""
        return {f.name: getattr(group, f.name) for group in self.groups.values() for f in fields(group)}


def resolve(groups: tuple[type, ...], given: Mapping[str, Given]) -> Settings:
    """
    Merge what was given over presets and defaults, check every value, and freeze.

    Args:
        groups: the option groups of a command, from ``groundup.config.options``.
        given: option name to value and origin; the caller has merged a file under the flags.

    Raises:
        ConfigError: one line for each unknown name, wrong type or value out of range.
    """
    declared = {f.name: (group, f) for group in groups for f in fields(group)}
    hints = {name: get_type_hints(group)[name] for name, (group, _) in declared.items()}
    problems = [_unknown(name, item, list(declared)) for name, item in given.items() if name not in declared]
    try:
        preset = _with_preset(given, declared)
    except ConfigError as error:
        preset = {}
        problems.append(str(error))
    layered = preset | {k: v for k, v in given.items() if k in declared}

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, (_, declaration) in declared.items():
        if name not in layered:
            values[name], origins[name] = declaration.default, "default"
            continue
        item = layered[name]
        try:
            values[name] = _checked(declaration, _converted(item.value, hints[name]))
            origins[name] = item.origin
        except ValueError as error:
            values[name] = declaration.default
            problems.append(f"{name}: {item.value!r} (from {item.origin}) {error}")

    if not problems:
        # The shape of somebody's weights is known once they are read; then its rules are asked.
        problems = contradictions(values, origins, shape_known=not values.get("init_from"))
    if problems:
        raise ConfigError("\n".join(problems))
    frozen = {group: group(**{f.name: values[f.name] for f in fields(group)}) for group in groups}
    return Settings(frozen, origins)


def read_config_file(path: Path) -> dict[str, Given]:
    """Read options from a TOML file: flat keys, or grouped in tables whose names do not matter."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path}: not found; give the path of a TOML file to --config") from None
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError, and integers of 5,000 digits
        raise ConfigError(f"config file {path}: cannot be read as TOML: {error}") from None
    found: dict[str, Given] = {}
    for key, value in document.items():
        inner = value if isinstance(value, dict) else {key: value}
        found |= {name.replace("-", "_"): Given(item, f"file {path}") for name, item in inner.items()}
    return found


def unknown_option_hint(name: str, known: list[str]) -> str:
    """The nearest known names, as a hint; empty when none is near."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _unknown(name: str, item: Given, known: list[str]) -> str:
    return f"{name}: no such option (from {item.origin}){unknown_option_hint(name, known) or '; see --help'}"


def _with_preset(given: Mapping[str, Given], declared: Mapping[str, Any]) -> dict[str, Given]:
    """The preset's values for the options of this command, if the command has a ``model`` option."""
    if "model" not in declared:
        return {}
    if "init_from" in given and given["init_from"].value:
        # A resolved configuration file holds both; there the shape is written out.
        both_in_file = given["init_from"].origin.startswith("file ")
        if "model" in given and not (both_in_file and given["model"].origin == given["init_from"].origin):
            raise ConfigError(
                f"model: {given['model'].value!r} (from {given['model'].origin}) names a shape, but init_from "
                f"{given['init_from'].value!r} has its own; leave --model out"
            )
        return {key: Given(value, "fine-tuning") for key, value in FINE_TUNING.items()}
    name = str(given["model"].value) if "model" in given else str(declared["model"][1].default)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        origin = given["model"].origin if "model" in given else "default"
        raise ConfigError(f"model: {name!r} (from {origin}) is not a preset{hint} Presets: {', '.join(PRESETS)}")
    return {key: Given(value, f"preset {name}") for key, value in PRESETS[name].items() if key in declared}


def _converted(value: object, hint: Any) -> Any:
    """Turn text, TOML or Python values into the declared type."""
    if isinstance(hint, types.UnionType):
        arms = get_args(hint)
        if value is None and type(None) in arms:
            return None
        if Ramp in arms and isinstance(value, str) and (":" in value or "@" in value):
            return Ramp(value)
        if str in arms and isinstance(value, str) and value.strip().lower().isalpha():
            return value.strip().lower()  # a number or a word, which the choices name
        hint = next(arm for arm in arms if arm is not type(None))
    if hint is bool:
        return _boolean(value)
    if hint is int:
        return whole_number(value)
    if hint is float:
        return _number(value)
    if hint is str:
        if isinstance(value, bool):  # an option that is true, false or a word
            return str(value).lower()
        if not isinstance(value, str | Path):
            raise ValueError("is not text")
        return _text(value)
    items = [value] if isinstance(value, str | Path) else list(value) if isinstance(value, list | tuple) else None
    if items is None or not all(isinstance(item, str | Path) for item in items):
        raise ValueError("is not text or a list of texts")
    return tuple(_text(item) for item in items)


def _text(value: object) -> str:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8") from None
    return str(value)


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("is not true or false")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is not a number")
    try:
        number = float(whole_number(value)) if isinstance(value, str) and ("^" in value or "**" in value) else float(value)
    except ValueError:
        raise ValueError("is not a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("is not a finite number")
    return number


def _checked(declaration: Field[Any], value: Any) -> Any:
    """Hold a value against the bounds and choices of its declaration."""
    rules = declaration.metadata
    if rules["choices"] and str(value).lower() in rules["choices"]:
        return str(value).lower()
    if rules["choices"] and isinstance(value, tuple):
        return tuple(_checked(declaration, item) for item in value)
    if rules["choices"] and isinstance(value, str):
        near = difflib.get_close_matches(value, rules["choices"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        number = " or a whole number" if isinstance(declaration.default, int) else ""
        raise ValueError(f"is not one of {', '.join(rules['choices'])}{number}{hint}")
    if isinstance(value, Ramp):
        for end in ends(value):
            _checked(declaration, end)
    if isinstance(value, int | float) and not isinstance(value, bool):
        unit = f" {rules['unit']}" if rules["unit"] else ""
        for words, bound, broken in (
            ("at least", rules["at_least"], operator.lt),
            ("above", rules["above"], operator.le),
            ("at most", rules["at_most"], operator.gt),
            ("below", rules["below"], operator.ge),
        ):
            if bound is not None and broken(value, bound):
                raise ValueError(f"must be {words} {bound:g}{unit}")
    return value
