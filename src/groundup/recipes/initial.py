"""Training that starts from somebody's weights: their shape and tokenizer become the run's."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from groundup.config.load import Settings
from groundup.config.options import InitialWeightsOptions, ModelOptions, TokenizerOptions
from groundup.config.rules import contradictions
from groundup.data.shards import Dataset
from groundup.errors import ConfigError
from groundup.interop.huggingface import read_config
from groundup.interop.imported import Imported, build_model, fitted, with_context, with_vocabulary
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.recipes.loading import is_ours, load_checkpoint
from groundup.recipes.prepare import tokenizer_named
from groundup.recipes.weights import open_weights, say_report
from groundup.tokenizer.tokenizer import Tokenizer, load_tokenizer

Say = Callable[[str], None]
# What the weights decide. The context may be changed; dropout and the like are the new run's own.
SHAPE = (
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "activation_function",
    "norm",
    "norm_position",
    "layer_norm_epsilon",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Start:
    """What a run starts from, or goes on from."""

    settings: Settings
    """With the shape of the weights."""
    tokenizer: Tokenizer | None
    """None where the files hold none: then the data's is taken."""
    weights: Imported | None
    """None for a run that goes on: its own checkpoint has them."""


def starting_point(settings: Settings, checkpoint: Path | None, say: Say) -> Start | None:
    """
    Read what ``init_from`` names; None where it names nothing. A run that goes on reads its own checkpoint instead.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: an option asks for another shape or tokenizer than the weights have.
    """
    source = settings[InitialWeightsOptions].init_from
    if checkpoint is not None and (was := _started_from(checkpoint)) != source:
        run = checkpoint.parent
        raise ConfigError(
            f"init_from: run {run} was started from {was or 'random weights'}, not {source or 'random weights'}; "
            + (
                f"to go on, give --init-from {was} (it need not exist any more); "
                if was
                else "to go on, leave --init-from out; "
            )
            + "to start anew, choose another --output-dir"
        )
    if not source:
        return None
    if checkpoint is not None:
        config = read_config(checkpoint / "config.json")
        return Start(_with_shape(settings, config, str(checkpoint), going_on=True), load_tokenizer(checkpoint), None)
    weights = _open(source, settings, say)
    tokenizer = weights.tokenizer
    if settings.origins["tokenizer"] != "default":
        name = settings[TokenizerOptions].tokenizer
        if name == "bpe" and tokenizer is None:
            raise ConfigError(
                f"tokenizer: 'bpe' (from {settings.origins['tokenizer']}) would be trained anew, but {source} has learned "
                "the ids of one; name that one, usually --tokenizer gpt2"
            )
        named = None if name == "bpe" else tokenizer_named(name)
        if tokenizer is not None and (named is None or not tokenizer.gives_the_ids_of(named)):
            raise ConfigError(
                f"tokenizer: {name!r} (from {settings.origins['tokenizer']}) is not the one that {source} was trained with; "
                "leave --tokenizer out"
            )
        tokenizer = tokenizer or named
    say(f"starting from {source}: {weights.format}, {parameter_count(weights.model):,} parameters")
    say_report(weights, say)
    return Start(_with_shape(settings, weights.model.config, source), tokenizer, weights)


def initial_model(weights: Imported, config: GPT2Config, tokenizer: Tokenizer, source: str, say: Say) -> GPT2:
    """
    The weights in a model of the run's configuration: vocabulary and context fitted.

    Args:
        tokenizer: of the data, where the weights have none.
    """
    fitting = fitted(weights, weights.tokenizer or tokenizer, source)
    say_report(replace(fitting, missing=(), unexpected=(), reshaped=fitting.reshaped[len(weights.reshaped) :]), say)
    model = fitting.model
    had, wanted = model.config.n_positions, config.n_positions
    if wanted < had:
        say(f"context: {had:,} → {wanted:,} tokens; positions from {wanted:,} on are cut off")
    elif wanted > had:
        say(
            f"context: {had:,} → {wanted:,} tokens; positions from {had:,} on are NEW: copies of the first ones, of no use "
            "until they are trained on texts that long"
        )
    if wanted != had:
        model = with_context(model, wanted, source)
    if (added := config.vocab_size - model.config.vocab_size) > 0:
        say(f"vocabulary: {added} special tokens are NEW: they begin as the mean of the others")
        model = with_vocabulary(model, config.vocab_size)
    return build_model(config, model.state_dict(), source)


def require_tokenizer(start: Start, dataset: Dataset, source: str) -> None:
    """
    Refuse data whose ids mean other text than the weights learned.

    Raises:
        ConfigError: the data was made with another tokenizer.
    """
    if start.tokenizer is not None and larger(start.tokenizer, dataset.tokenizer) is None:
        raise ConfigError(
            f"tokenizer: {dataset.directory} was made with another tokenizer than {source} was trained with "
            f"({dataset.tokenizer.vocab_size:,} and {start.tokenizer.vocab_size:,} ids); give the text itself, or prepare it "
            f"with --tokenizer and the tokenizer of {source}"
        )


def larger(one: Tokenizer, other: Tokenizer) -> Tokenizer | None:
    """The tokenizer that has all ids of the other, and special tokens of its own perhaps; None where neither has."""
    if one.gives_the_ids_of(other):
        return one
    return other if other.gives_the_ids_of(one) else None


def freeze(model: nn.Module, patterns: tuple[str, ...], origin: str) -> list[str]:
    """
    Take parameters out of training, by shell-style patterns of their names; returns what is frozen.

    Raises:
        ConfigError: a pattern matches nothing, or together they match everything.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"freeze: {pattern!r} (from {origin}) matches no parameter; they are called {names[0]}, {names[1]}, "
                f"{names[2]} … {names[-1]}"
            )
    frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        raise ConfigError(f"freeze: {', '.join(patterns)} (from {origin}) matches every parameter; leave some to train")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def _started_from(checkpoint: Path) -> str:
    """What a run was started from; nothing for random weights, and where that cannot be read."""
    try:
        identity = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["identity"]
        return str(identity.get("init_from", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _open(source: str, settings: Settings, say: Say) -> Imported:
    if is_ours(Path(source)):
        loaded = load_checkpoint(Path(source), say)
        return Imported(loaded.model, loaded.tokenizer, f"groundup checkpoint {loaded.checkpoint}")
    n_head = settings[ModelOptions].n_head if settings.origins["n_head"] != "default" else 0
    return open_weights(source, say, n_head=n_head)


def _with_shape(settings: Settings, config: GPT2Config, source: str, *, going_on: bool = False) -> Settings:
    """
    The settings with the weights' shape; their context too, unless another was asked for.

    Args:
        going_on: with the run's own weights, whose vocabulary may have grown by special tokens.
    """
    options, origins = settings[ModelOptions], settings.origins
    if not going_on and config.vocab_size != settings[TokenizerOptions].vocab_size and origins["vocab_size"] != "default":
        raise ConfigError(
            f"vocab_size: {settings[TokenizerOptions].vocab_size} (from {origins['vocab_size']}), but {source} has "
            f"{config.vocab_size}; leave it out"
        )
    wrong = [
        f"{name}: {getattr(options, name)} (from {origins[name]}), but {source} has {getattr(config, name)}; leave it out"
        for name in SHAPE
        if origins[name] != "default" and getattr(options, name) != getattr(config, name)
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    taken = [name for name in (*SHAPE, "n_positions") if origins[name] == "default"]
    shaped = replace(options, **{name: getattr(config, name) for name in taken})
    result = Settings({**settings.groups, ModelOptions: shaped}, {**origins, **dict.fromkeys(taken, source)})
    if problems := contradictions(result.flat(), result.origins):
        raise ConfigError("\n".join(problems))
    return result
