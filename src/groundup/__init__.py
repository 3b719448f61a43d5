"""
groundup: pre-train GPT-2-style language models from the ground up.

    import groundup

    groundup.train("my_folder", output_dir="run", max_steps=500)
    print(groundup.evaluate("run")["bits_per_byte"])
    print(groundup.generate("run", prompt="def main(")["completions"][0]["text"])

Importing is free: each name is loaded when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Every public name, and the module that holds it.
_PUBLIC = {
    "GPT2": "groundup.model.gpt2",
    "GPT2Config": "groundup.model.gpt2",
    "GroundupError": "groundup.errors",
    "StepResult": "groundup.training.loop",
    "Tokenizer": "groundup.tokenizer.tokenizer",
    "Training": "groundup.recipes.training",
    "doctor": "groundup.recipes.api",
    "evaluate": "groundup.recipes.api",
    "export": "groundup.recipes.api",
    "generate": "groundup.recipes.api",
    "import_model": "groundup.recipes.api",
    "load": "groundup.recipes.api",
    "open_training": "groundup.recipes.api",
    "prepare": "groundup.recipes.api",
    "score": "groundup.recipes.api",
    "train": "groundup.recipes.api",
}

__all__ = sorted([*_PUBLIC, "diagnostics"])  # noqa: PLE0605 - one list, not two


def __getattr__(name: str) -> Any:
    if name == "diagnostics":  # a room of which names are used as groundup.diagnostics.check
        return import_module("groundup.diagnostics")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'groundup' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
