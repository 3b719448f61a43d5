"""Importing changes nothing in the process, and what is light stays light."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import groundup

MODULES = sorted(name for _, name, _ in pkgutil.walk_packages(groundup.__path__, "groundup.") if not name.endswith("__main__"))

# What importing must leave as it was. torch is imported first in one case, so that its own doings are not ours.
SNAPSHOT = """
import builtins, json, logging, os, random, signal, sys, threading, warnings
if "torch" in sys.argv[2:]:
    import torch
else:
    torch = None
import numpy.random

def state():
    handlers = {str(n): repr(signal.getsignal(n)) for n in signal.valid_signals()}
    seen = {
        "environment": dict(os.environ),
        "signals": handlers,
        "folder": os.getcwd(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "python random": hash(random.getstate()),
        "numpy random": repr(numpy.random.get_state()),
        "log handlers": repr(logging.root.handlers),
        "log level": logging.root.level,
        "our log handlers": repr(logging.getLogger("groundup").handlers),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(threading.excepthook)],
        "limits": [sys.getrecursionlimit(), repr(sys.getswitchinterval())],
        "streams": [id(sys.stdout), id(sys.stderr), sys.stdout.errors],
        "warning filters": repr(warnings.filters) if torch else None,
        "start method": None,
        "children": open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read() if os.path.isdir("/proc/self/task") else "",
    }
    if torch:
        seen |= {
            "torch random": torch.initial_seed() and torch.get_rng_state().sum().item(),
            "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
            "torch defaults": [repr(torch.get_default_dtype()), repr(torch.get_default_device())],
            "torch determinism": torch.are_deterministic_algorithms_enabled(),
            "torch precision": torch.get_float32_matmul_precision(),
            "torch gradients": torch.is_grad_enabled(),
            "cuda started": torch.cuda.is_initialized(),
        }
    return seen

before = state()
files = set(os.listdir())
for name in json.loads(sys.argv[1]):
    __import__(name)
after = state()
print(json.dumps({
    "changed": {key: [str(before[key])[:300], str(after[key])[:300]] for key in before if before[key] != after[key]},
    "files": sorted(set(os.listdir()) - files),
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def imported(modules, tmp_path, *first):
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT, json.dumps(modules), *first],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    # Nothing is printed either.
    assert len(lines) == 1
    return json.loads(lines[0])


def test_there_is_something_to_import():
    assert len(MODULES) > 40
    assert {"groundup.cli.main", "groundup.recipes.train", "groundup.data.prepare"} <= set(MODULES)


# Each module in a process of its own, where nothing of ours was imported; other people's libraries are there already.
ONE_BY_ONE = """
import importlib, json, os, sys, traceback
import numpy, safetensors.torch, tokenizers, torch, torch.nn.functional
assert not any(name.startswith("groundup") for name in sys.modules)
for name in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print("done", flush=True)
"""


@pytest.mark.slow
def test_any_module_can_be_imported_first():
    """No import works only after another, and none prints."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, json.dumps(MODULES)], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_importing_everything_changes_nothing(tmp_path):
    found = imported(MODULES, tmp_path, "torch")
    assert found["changed"] == {}
    assert found["files"] == []


LIGHT = {
    "groundup": {"torch", "numpy", "click", "tokenizers"},
    "groundup.errors": {"torch", "numpy", "click", "tokenizers"},
    "groundup.config.load": {"torch", "numpy", "click", "tokenizers"},
    "groundup.config.plan": {"torch", "numpy", "click", "tokenizers"},
    "groundup.config.reference": {"torch", "numpy", "click", "tokenizers"},
    "groundup.cli.main": {"torch", "numpy", "rich", "tokenizers", "matplotlib"},
    "groundup.data.prepare": {"torch", "matplotlib", "pyarrow", "transformers"},
    "groundup.recipes.prepare": {"torch", "matplotlib", "pyarrow", "transformers"},
    "groundup.tokenizer.tokenizer": {"torch", "transformers", "pyarrow"},
    "groundup.recipes.watch": {"torch", "matplotlib", "starlette", "uvicorn"},
}


@pytest.mark.parametrize("name", LIGHT)
def test_what_is_light_stays_light(name):
    script = f"import sys, {name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert "groundup" in loaded
    assert not loaded & LIGHT[name]


def test_importing_the_preparing_path_changes_nothing(tmp_path):
    """The light half of the house, where torch is not even loaded."""
    found = imported(["groundup.cli.main", "groundup.recipes.prepare", "groundup.data.foreign"], tmp_path)
    assert found["changed"] == {}
    assert found["files"] == []
    assert "torch" not in found["loaded"]


def test_preparing_for_real_loads_no_torch(tmp_path):
    """Not only its import: the whole command."""
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    script = (
        "import sys; from groundup.cli.main import run; "
        "code = run(['prepare', 'text.txt', '--output-dir', 'data', '--vocab-size', '260']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "0 False"


# --- public names ---


def test_every_public_name_resolves_to_what_it_says():
    assert set(groundup.__all__) == {
        "GPT2", "GPT2Config", "GroundupError", "StepResult", "Tokenizer", "Training",
        "diagnostics", "doctor", "evaluate", "export", "generate", "import_model", "load", "open_training",
        "prepare", "score", "train",
    }  # fmt: skip
    for name in groundup.__all__:
        found = getattr(groundup, name)
        assert found.__name__.removeprefix("groundup.") == name
        assert found.__doc__
        assert name in dir(groundup)


def test_a_star_import_gives_the_public_names_and_no_others():
    space = {}
    exec("from groundup import *", space)
    assert set(space) - {"__builtins__"} == set(groundup.__all__)


def test_an_unknown_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="module 'groundup' has no attribute 'trian'"):
        _ = groundup.trian
    assert not hasattr(groundup, "utils")


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert groundup.__version__ == version("groundup")


def test_the_package_says_that_it_is_typed():
    assert (Path(groundup.__file__).parent / "py.typed").is_file()
