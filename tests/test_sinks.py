"""Where report_to sends a run's numbers: what is written there, and that training never notices."""

import importlib.util
import json
import math
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from groundup.cli.main import run as command
from groundup.errors import ConfigError, Stopped
from groundup.tracking import sinks as module
from groundup.tracking.metrics import read_rows
from groundup.tracking.sinks import OPENERS, Sinks, open_sinks, require_installed
from tests.conftest import TINY, flags, groundup

LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
CONFIG = {"learning_rate": 0.001, "report_to": ["wandb"], "path": Path("data")}
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": ""}


def rows(first: int, last: int, plus: float = 0.0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: steps, and an evaluation of every third."""
    found: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        found.append({"step": step, "loss": 10.0 - step + plus, "batch_digest": "5f", "mfu": None})
        if step % 3 == 0:
            found.append({"step": step, "eval_loss": 20.0 - step + plus})
    return found


def expected(last: int) -> dict[str, dict[int, float]]:
    return {
        "train/loss": {step: 10.0 - step for step in range(1, last + 1)},
        "eval/loss": {step: 20.0 - step for step in range(3, last + 1, 3)},
    }


class Remembering:
    """A service that remembers what it was told, and fails when it is asked to."""

    def __init__(self, fails: str = ""):
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed: list[bool] = []
        self.fails = fails

    def log(self, step: int, values: Mapping[str, float]) -> None:
        print("on standard output")
        if self.fails == "log":
            raise OSError(28, "No space left\non device")
        self.rows.append((step, dict(values)))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)
        if self.fails:
            raise RuntimeError("gone")


def test_rows_have_hugging_faces_names_and_numbers_only():
    sink = Remembering()
    sinks = Sinks({"fake": sink})
    sinks.log({"step": 7, "loss": 1.5, "eval_bits_per_byte": 2, "batch_digest": "af", "mfu": None, "eval_ema_loss": 3.0,
               "health": {"grad_norm": {"h.0": 0.5, "ln_f": None}}, "spike": {"loss": {"score": 9.0}, "steps": 9}})  # fmt: skip
    assert sink.rows == [(7, {
        "train/loss": 1.5, "eval/bits_per_byte": 2, "eval/ema_loss": 3.0, "health/grad_norm/h.0": 0.5,
        "spike/loss/score": 9.0, "spike/steps": 9,
    })]  # fmt: skip


def test_one_that_fails_is_given_up_with_one_warning_and_the_others_go_on(capsys):
    said: list[str] = []
    bad, good = Remembering(fails="log"), Remembering()
    with Sinks({"bad": bad, "good": good}, said.append) as sinks:
        for row in rows(1, 2):
            sinks.log(row)
    assert len(said) == 1
    assert said[0].startswith("report_to: bad failed (OSError: [Errno 28] No space left on device); no more is sent there")
    assert (len(good.rows), good.closed, bad.closed) == (2, [False], [True])
    assert capsys.readouterr().out == "", "standard output is for results"


def test_one_that_fails_at_the_end_is_told_of_and_no_more():
    said: list[str] = []
    bad, good = Remembering(fails="close"), Remembering()
    sinks = Sinks({"good": good, "bad": bad}, said.append)
    sinks.close()
    sinks.close()
    assert len(said) == 1
    assert "bad failed (RuntimeError: gone)" in said[0]
    assert good.closed == [False]


@pytest.mark.parametrize(("error", "failed"), [(ValueError("no"), True), (Stopped("by a signal"), False)])
def test_an_error_of_the_run_is_told_and_a_signal_is_none(error, failed):
    sink = Remembering()
    with pytest.raises(type(error)), Sinks({"fake": sink}):
        raise error
    assert sink.closed == [failed]


def test_ctrl_c_is_not_swallowed():
    class Interrupted(Remembering):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks({"fake": Interrupted()}).log({"step": 1})


def test_none_is_nothing(tmp_path):
    with open_sinks(["none"], tmp_path, run_name="run", config=CONFIG, resumed_step=0) as sinks:
        sinks.log({"step": 1, "loss": 2.0})
    assert list(tmp_path.iterdir()) == []
    assert Sinks().log({"step": 1}) is None


def test_each_is_opened_once_and_all_are_closed_when_one_cannot_be(tmp_path, monkeypatch):
    opened: list[Remembering] = []
    ids: list[str] = []

    def opener(run: Path, run_name: str, run_id: str, config: dict[str, Any], resumed_step: int) -> Remembering:
        opened.append(Remembering())
        ids.append(run_id)
        assert config == CONFIG | {"path": "data"}
        return opened[-1]

    monkeypatch.setitem(OPENERS, "tensorboard", opener)
    open_sinks(["tensorboard", "none", "tensorboard"], tmp_path, run_name="run", config=CONFIG, resumed_step=0)
    assert len(opened) == 1
    monkeypatch.setitem(OPENERS, "trackio", opener)
    open_sinks(["tensorboard", "trackio"], tmp_path, run_name="run", config=CONFIG, resumed_step=0)
    assert ids[1] == ids[2] == (tmp_path / module.RUN_ID).read_text() != ids[0]
    opened.clear()
    opened.append(Remembering())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError):
        open_sinks(["tensorboard", "wandb"], tmp_path, run_name="run", config=CONFIG, resumed_step=0)
    assert opened[1].closed == [True]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_cannot_be_imported_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    with pytest.raises(ConfigError) as caught:
        open_sinks([name], tmp_path, run_name="run", config=CONFIG, resumed_step=0)
    message = str(caught.value)
    assert message.startswith(f"report_to: {name} cannot be imported (ModuleNotFoundError: ")
    assert f"pip install 'groundup[{name}]'" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_not_installed_is_told_before_anything_is_written(name, tmp_path, text_file, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda asked, *package: None if asked == name else real(asked, *package))
    arguments = ["train", str(text_file), "--output-dir", str(tmp_path / "run"), *flags(TINY), "--report-to", name]
    assert command(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]
    expected = f"report_to: {name} (from --report-to) is not installed; pip install 'groundup[{name}]', or leave it out"
    assert line.endswith(expected)
    assert list(tmp_path.iterdir()) == [text_file]


def test_a_folder_is_no_library_and_all_that_are_missing_are_named_once(tmp_path, monkeypatch):
    """wandb makes a folder called wandb; Python takes it for a package without content."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in LIBRARIES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError) as caught:
        require_installed(["wandb", "none", "trackio", "wandb"], "run.toml")
    assert str(caught.value).startswith("report_to: wandb, trackio (from run.toml) are not installed; ")
    assert "pip install 'groundup[wandb,trackio]'" in str(caught.value)
    (tmp_path / "trackio" / "__init__.py").touch()
    require_installed(["trackio", "none"], "run.toml")


@pytest.mark.parametrize(("name", "advice"), [("tensorboard", "; or leave"), ("wandb", "wandb login")])
def test_a_library_that_cannot_start_is_one_line(name, advice, tmp_path, monkeypatch):
    def opener(*arguments: Any) -> Remembering:
        raise RuntimeError("no\nkey")

    monkeypatch.setitem(OPENERS, name, opener)
    with pytest.raises(ConfigError, match=f"report_to: {name} cannot start \\(RuntimeError: no key\\).*{advice}"):
        open_sinks([name], tmp_path, run_name="run", config=CONFIG, resumed_step=0)


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="report_to: 'mlflow' is none of tensorboard, wandb, trackio, none; choose one"):
        open_sinks(["mlflow"], tmp_path, run_name="run", config=CONFIG, resumed_step=0)


def test_a_run_keeps_its_name_when_it_is_resumed_and_only_then(tmp_path):
    first = module._run_id(tmp_path, 0)
    assert module._run_id(tmp_path, 5) == module._run_id(tmp_path, 6) == first
    assert module._run_id(tmp_path, 0) != first
    (tmp_path / module.RUN_ID).write_bytes(b"\xff/../")
    assert module._run_id(tmp_path, 7).isalnum()
    random.seed(1)
    one = module._run_id(tmp_path, 0)
    random.seed(1)
    assert module._run_id(tmp_path, 0) != one, "two runs with one seed are two runs"


def test_tensorboard_gets_a_curve_without_double_points(tmp_path):
    """Ten steps; then, from the checkpoint at step 6, others; read back by TensorBoard itself."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, last, plus in ((0, 10, 0.5), (6, 8, 0.0)):
        with open_sinks(["tensorboard"], tmp_path, run_name="run", config=CONFIG, resumed_step=resumed) as sinks:
            for row in rows(resumed + 1, last, plus):
                sinks.log(row)
            assert sinks.opened
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step, 10.5 - step) for step in range(1, 7)] + [(7, 3.0), (8, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(3, 17.5), (6, 14.5)]
    assert b'"learning_rate": 0.001' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_of_a_run_that_starts_anew_forgets_the_old_one(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last, plus in ((5, 0.5), (2, 0.0)):
        with open_sinks(["tensorboard"], tmp_path, run_name="run", config=CONFIG, resumed_step=0) as sinks:
            for row in rows(0, last, plus):
                sinks.log(row)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 10.0), (1, 9.0), (2, 8.0)]


def test_numbers_that_are_not_finite_are_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(["tensorboard"], tmp_path, run_name="run", config=CONFIG, resumed_step=0) as sinks:
        sinks.log({"step": 1, "loss": math.nan})
        sinks.log({"step": 2, "loss": math.inf})
        assert sinks.opened
    found = [event.value for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")]
    assert math.isnan(found[0])
    assert found[1] == math.inf


# In a process of its own: importing these libraries, and what they leave behind, is part of what is tested.
WATCHED = """
import json, os, random, signal, sys
from pathlib import Path
import numpy, torch
from groundup.tracking.sinks import open_sinks

def state():
    return {
        "random": hash(random.getstate()),
        "numpy": str(numpy.random.get_state()),
        "torch": torch.get_rng_state().sum().item(),
        "signals": {str(n): repr(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)},
        "exits": [repr(sys.exit), repr(sys.excepthook)],
        "streams": [id(sys.stdout), id(sys.stderr)],
        "folder": os.getcwd(),
        "trackio": os.environ.get("TRACKIO_DIR"),
    }

name, run, resumed, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
os.environ.pop("TRACKIO_DIR")
torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
before, seen = state(), {}
with open_sinks([name], run, run_name="run", config={"learning_rate": 0.001}, resumed_step=resumed) as sinks:
    seen["open"] = state()
    for row in rows:
        sinks.log(row)
    seen["log"] = state()
    alive = list(sinks.opened)
seen["close"] = state()
print(json.dumps({"alive": alive, "changed": {when: [k for k in before if s[k] != before[k]] for when, s in seen.items()}}))
"""


def watched(name: str, run: Path, resumed: int, some: list[dict[str, Any]]) -> None:
    """Log rows in a new process, which must show no trace but the files."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, name, str(run), str(resumed), json.dumps(some)],
        env=os.environ | OFFLINE, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else is on standard output
    assert result == {"alive": [name], "changed": {"open": [], "log": [], "close": []}}, done.stderr


def wandb_history(file: Path) -> dict[str, dict[int, float]]:
    """The curves in an offline run's file: protobuf records in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, held = file.read_bytes(), 7, b""
    curves: dict[str, dict[int, float]] = {}
    while at < len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        held += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                for name in items.keys() - {"_step", "_runtime", "_timestamp"}:
                    curves.setdefault(name, {})[items["_step"]] = items[name]
    return curves


@pytest.mark.slow
def test_wandb_writes_offline_under_one_name(tmp_path):
    """Without a network, without an account; a second process goes on in the run of the first."""
    pytest.importorskip("wandb")
    watched("wandb", tmp_path, 0, rows(1, 6))
    watched("wandb", tmp_path, 6, rows(7, 9))
    name = (tmp_path / module.RUN_ID).read_text()
    first, second = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert wandb_history(first) == expected(6)
    curves = wandb_history(second)
    assert curves == {"train/loss": {7: 3.0, 8: 2.0, 9: 1.0}, "eval/loss": {9: 11.0}}


@pytest.mark.slow
def test_trackio_gets_a_curve_without_double_points(tmp_path):
    """Ten steps; then again from step 6: what is there stays, and is there once."""
    pytest.importorskip("trackio")
    watched("trackio", tmp_path, 0, rows(1, 10))
    watched("trackio", tmp_path, 6, rows(7, 12))
    connection = sqlite3.connect(tmp_path / "trackio" / "groundup.db")
    found = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id").fetchall()
    connection.close()
    assert {name for name, _, _ in found} == {f"run-{(tmp_path / module.RUN_ID).read_text()}"}
    points = [(key, step, value) for _, step, metrics in found for key, value in json.loads(metrics).items()]
    assert len(points) == len({(key, step) for key, step, _ in points}), "no step twice"
    curves: dict[str, dict[int, float]] = {}
    for key, step, value in points:
        curves.setdefault(key, {})[step] = value
    assert curves == expected(12)


@pytest.mark.slow
def test_tensorboard_leaves_no_trace_in_the_process(tmp_path):
    pytest.importorskip("tensorboard")
    watched("tensorboard", tmp_path, 0, rows(1, 3))


INTERRUPTED = """
import sys, time
from pathlib import Path
from groundup.runtime.signals import stop_requests
from groundup.tracking.sinks import open_sinks

with stop_requests(lambda line: None) as should_stop:
    with open_sinks([sys.argv[1]], Path(sys.argv[2]), run_name="run", config={}, resumed_step=0) as sinks:
        step = 0
        while not should_stop():
            step += 1
            sinks.log({"step": step, "loss": 1.0 / step})
            if step == 3:
                print("running", flush=True)
            time.sleep(0.02)
        sinks.log({"step": step + 1, "loss": 7.0})
        assert sinks.opened
print(step + 1, flush=True)
sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_ctrl_c_stops_the_run_and_not_the_service(name, tmp_path):
    """A terminal sends Ctrl-C to all processes of the command: the row that is logged afterwards must arrive too."""
    pytest.importorskip(LIBRARIES[name])
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, name, str(tmp_path)], env=os.environ | OFFLINE | {"TRACKIO_DIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    if name == "wandb":
        (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
        assert wandb_history(file)["train/loss"][int(out)] == 7.0


@pytest.mark.slow
def test_a_run_that_is_watched_learns_the_same(tmp_path, text_file):
    """Every service that is installed, and health at every third step: weights, moments and logged numbers are the same."""
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    reports = [part for name in installed for part in ("--report-to", name)]
    options = TINY | {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    for run, extra in (("plain", []), ("watched", ["--health-steps", "3", *reports])):
        done = groundup("train", text_file, "--output-dir", tmp_path / run, *flags(options), *extra, "--json", env=OFFLINE)
        assert done.code == 0, done.err
        assert done.json["steps"] == 12
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "plain/checkpoint-12" / file).read_bytes() == (
            tmp_path / "watched/checkpoint-12" / file
        ).read_bytes()
    plain, watched = (read_rows(tmp_path / run / "metrics.jsonl") for run in ("plain", "watched"))
    assert [row["step"] for row in watched if "health" in row] == [3, 6, 9, 12]
    assert [(row["step"], row.get("loss"), row.get("eval_loss"), row.get("grad_norm")) for row in watched] == [
        (row["step"], row.get("loss"), row.get("eval_loss"), row.get("grad_norm")) for row in plain
    ]
