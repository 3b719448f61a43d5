"""
README.md of a model folder, as the Hugging Face Hub shows it: what the model was trained on, how, and how good it is.

Source: https://huggingface.co/docs/hub/model-cards (the front matter's keys). What is not known is left out, not guessed.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError, safe_open

from groundup.tracking.metrics import METRICS, read_rows

Facts = Mapping[str, Any]
Row = tuple[str, str]
SHOWN_SOURCES = 20


def model_card(
    name: str,
    *,
    shape: Facts | None = None,
    parameters: int | None = None,
    configuration: Facts | None = None,
    dataset: Facts | None = None,
    state: Facts | None = None,
    rows: Sequence[Facts] = (),
    weights_from: str | None = None,
    license: str = "",
) -> str:
    """
    Write the card from what is known; every part may be missing.

    Args:
        name: the title.
        shape: config.json of the model.
        parameters: how many weights it has.
        configuration: config.toml of the run, parsed.
        dataset: dataset.json of what it was trained on, parsed.
        state: trainer_state.json of the checkpoint, parsed.
        rows: the lines of metrics.jsonl; those after the checkpoint's step are not its own and are passed over.
        weights_from: where the weights came from before this training, for people; empty for random ones, None for what
            the configuration's ``init_from`` says.
        license: an identifier of the Hub's list, where the owner chose one.

    Returns:
        Markdown with YAML front matter.
    """
    shape, configuration, dataset, state = shape or {}, configuration or {}, dataset or {}, state or {}
    options = {key: value for table in configuration.values() if isinstance(table, Mapping) for key, value in table.items()}
    if weights_from is None and isinstance(options.get("init_from"), str):
        weights_from = options["init_from"]
    parts = [
        _front_matter(license),
        f"# {_escaped(name)}",
        _introduction(parameters, state, weights_from),
        _use(),
        _table("Results", _results(rows, state)),
        _data(configuration, dataset),
        _table("Model", _model(shape, parameters)),
        _table("Training", [*_progress(state), *_method(options)] if state else []),
        _again(configuration),
        _table("Versions", [(key, _code(value)) for key, value in _mapping(state, "versions").items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_of_checkpoint(checkpoint: Path, *, weights_from: str | None = None, license: str = "") -> str:
    """
    The card of a checkpoint folder, from its own files and from its run's, where it lies in one.

    A Hugging Face folder that is no checkpoint of ours gets a card too, with what its config.json says. Files that are
    missing or cannot be read are left out: whether a checkpoint is whole, ``checkpoint.commit.verify`` says.
    """
    run = checkpoint.absolute().parent
    state, shape = _json(checkpoint / "trainer_state.json"), _json(checkpoint / "config.json")
    # Only a checkpoint of a run has the run's files around it; an exported folder lies among strangers.
    configuration = _toml(run / "config.toml") if state else {}
    dataset = _json(run / "dataset" / "dataset.json") if state else {}
    sources = configuration.get("sources")
    if state and not dataset and isinstance(sources, list) and len(sources) == 1:
        dataset = _json(Path(str(sources[0])) / "dataset.json")
    return model_card(
        run.name if state else checkpoint.absolute().name,
        shape=shape,
        parameters=_count_parameters(checkpoint / "model.safetensors", tied=shape.get("tie_word_embeddings") is not False),
        configuration=configuration,
        dataset=dataset,
        state=state,
        rows=read_rows(run / METRICS) if state else [],
        weights_from=weights_from,
        license=license,
    )


# The sections


def _front_matter(license: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if license:
        lines.append(f"license: {json.dumps(license)}")
    return "\n".join([*lines, "tags:", "- gpt2", "- groundup", "---"])


def _introduction(parameters: int | None, state: Facts, weights_from: str | None) -> str:
    size = f" with {parameters:,} parameters" if parameters else ""
    lines = [f"A GPT-2{size}, written by groundup. It continues text; it was not taught to follow instructions."]
    if weights_from == "":
        lines.append("Its training started from random weights.")
    elif weights_from and state:
        lines.append(f"Its training started from the weights of {_code(weights_from)}.")
    elif weights_from:
        lines.append(f"Its weights came from {_code(weights_from)}.")
    return "\n".join(lines)


def _use() -> str:
    return """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file, or the model's name on the Hub
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100, do_sample=True, top_k=50)[0]))
```

```bash
groundup generate . --prompt "Once"
```"""


def _results(rows: Sequence[Facts], state: Facts) -> list[Row]:
    """The last evaluation and the last logged loss up to the checkpoint's step."""
    step = state.get("global_step")
    own = [row for row in rows if not (_is_number(step) and _is_number(row.get("step")) and row["step"] > step)]
    evaluated = next((row for row in reversed(own) if _is_number(row.get("eval_loss"))), {})
    trained = next((row for row in reversed(own) if _is_number(row.get("loss"))), {})
    found = [
        ("validation loss (nats per token)", _number(evaluated.get("eval_loss"), ".4f")),
        ("validation perplexity", _number(evaluated.get("eval_perplexity"), ",.2f")),
        ("validation bits per byte", _number(evaluated.get("eval_bits_per_byte"), ".3f")),
        ("validation token accuracy", _number(evaluated.get("eval_token_accuracy"), ".1%")),
        ("measured on", _number(evaluated.get("eval_tokens"), ",", " tokens of the validation split")),
        ("measured at step", _number(evaluated.get("step") if evaluated else None, ",")),
        ("last logged training loss (nats per token)", _number(trained.get("loss"), ".4f")),
        ("logged at step", _number(trained.get("step") if trained else None, ",")),
    ]
    return _known(found)


def _data(configuration: Facts, dataset: Facts) -> str:
    sources = _mapping(dataset, "request").get("sources") or configuration.get("sources")
    sources = [str(source) for source in sources] if isinstance(sources, list) else []
    splits, request = _mapping(dataset, "splits"), _mapping(dataset, "request")

    def tokens(split: str) -> str:
        facts = _mapping(splits, split)
        documents, size = facts.get("documents"), facts.get("bytes")
        of = [_number(documents, ",", " document" if documents == 1 else " documents"), _number(size, ",", " bytes")]
        return _number(facts.get("tokens"), ",", f" tokens ({', '.join(filter(None, of))})" if any(of) else " tokens")

    table = _table(
        "Data",
        _known(
            [
                ("training split", tokens("train")),
                ("validation split", tokens("validation")),
                ("tokenizer", _code(request["tokenizer"]) if request.get("tokenizer") else ""),
                ("vocabulary", _number(dataset.get("vocab_size"), ",", " ids")),
                ("end of a document", _code(dataset["end_of_text"]) if dataset.get("end_of_text") else ""),
                ("content's sha256", _code(dataset["content_sha256"]) if dataset.get("content_sha256") else ""),
            ]
        ),
    )
    if not sources:
        return table
    listed = [f"- {_code(source)}" for source in sources[:SHOWN_SOURCES]]
    if len(sources) > SHOWN_SOURCES:
        listed.append(f"- and {len(sources) - SHOWN_SOURCES:,} more, all in the configuration below")
    return "\n".join([table or "## Data", "", "Sources, as they were given:", "", *listed])


def _model(shape: Facts, parameters: int | None) -> list[Row]:
    embedding, head = shape.get("n_embd"), "its own matrix" if shape.get("tie_word_embeddings") is False else "the embedding"
    inner = shape.get("n_inner") or (4 * embedding if isinstance(embedding, int) else None)
    return _known(
        [
            ("parameters", _number(parameters, ",")),
            ("layers", _number(shape.get("n_layer"), ",")),
            ("attention heads", _number(shape.get("n_head"), ",")),
            ("width", _number(embedding, ",")),
            ("width inside the MLP", _number(inner, ",")),
            ("context", _number(shape.get("n_positions"), ",", " tokens")),
            ("vocabulary", _number(shape.get("vocab_size"), ",", " ids")),
            ("head", head if shape else ""),
        ]
    )


def _progress(state: Facts) -> list[Row]:
    identity, planned = _mapping(state, "identity"), _number(state.get("max_steps"), ",")
    skipped = _mapping(state, "state").get("skipped_steps")
    return _known(
        [
            ("steps", _number(state.get("global_step"), ",", f" of {planned} planned" if planned else "")),
            ("tokens seen", _number(state.get("num_input_tokens_seen"), ",")),
            ("epochs", _number(state.get("epoch"), ",.3f")),
            ("batch", _number(identity.get("total_batch_tokens"), ",", " tokens a step")),
            ("steps skipped, because a gradient was not finite", _number(skipped, ",") if skipped else ""),
        ]
    )


def _method(options: Facts) -> list[Row]:
    adam = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
    schedule = ("warmup_steps", "min_lr_rate")
    dropout = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    precision = [name for name in ("bf16", "fp16") if options.get(name) is True]
    if not precision and any(options.get(name) is False for name in ("bf16", "fp16")):
        precision = ["float32"]
    return _known(
        [
            ("optimizer", _listed(str(options.get("optim") or "AdamW"), options, adam) if options else ""),
            ("learning rate", _number(options.get("learning_rate"), "g")),
            (
                "schedule",
                _listed(str(options["lr_scheduler_type"]), options, schedule) if "lr_scheduler_type" in options else "",
            ),
            ("parameters left as they were", ", ".join(_code(pattern) for pattern in options.get("freeze") or ())),
            ("dropout", _listed("", options, dropout) if any(options.get(name) for name in dropout) else ""),
            ("precision", ", ".join(precision)),
            ("seed", _number(options.get("seed"), "d") if isinstance(options.get("seed"), int) else ""),
        ]
    )


def _again(configuration: Facts) -> str:
    if not configuration:
        return ""
    text = tomli_w.dumps(configuration).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"""## Train another like it

Save the configuration as `config.toml`, in a folder from which its sources are found:

```bash
groundup train --config config.toml --output-dir another
```

<details>
<summary>config.toml: every option of this run</summary>

{fence}toml
{text}
{fence}

</details>"""


# Markdown that stays valid, whatever the values are


def _table(title: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return "\n".join(
        [f"## {title}", "", "| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)]
    )


def _cell(text: str) -> str:
    """A pipe ends a cell of a table, even inside code, unless it is escaped."""
    return text.replace("|", "\\|")


def _code(value: Any) -> str:
    """Inline code: fenced by more backticks than it holds (CommonMark, section 6.1)."""
    text = _printable(str(value))
    runs = [len(run) for run in re.findall("`+", text)]
    if not runs:
        return f"`{text}`"
    fence = "`" * (max(runs) + 1)
    return f"{fence} {text} {fence}"


def _escaped(text: str) -> str:
    """Ordinary text, in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", _printable(text))


def _printable(text: str) -> str:
    """Line breaks, control characters and broken Unicode as escapes, so that a value stays on its line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _listed(first: str, options: Facts, names: Iterable[str]) -> str:
    values = [f"{name} {_printable(str(options[name]))}" for name in names if name in options]
    return ", ".join([_printable(first), *values] if first else values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if _is_number(value) else ""


def _known(rows: Sequence[Row]) -> list[Row]:
    return [(name, value) for name, value in rows if value]


# Files


def _mapping(facts: Facts, name: str) -> Facts:
    value = facts.get(name)
    return value if isinstance(value, Mapping) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _count_parameters(path: Path, *, tied: bool) -> int | None:
    """The weights that a safetensors file holds, from its header; a tied head counts once."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if not (tied and name == "lm_head.weight")]  # noqa: SIM118 - no mapping
            return sum(prod(file.get_slice(name).get_shape()) for name in names) or None
    except (OSError, SafetensorError):
        return None
