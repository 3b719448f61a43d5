"""groundup doctor as a whole: what it examines, what it says, and that it leaves everything as it was."""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import groundup
from groundup.checkpoint.commit import checkpoints
from groundup.cli.main import run as command
from groundup.config.load import Given, Settings, resolve
from groundup.config.options import DOCTOR_GROUPS, ModelOptions, OptimizerOptions
from groundup.diagnostics.check import Check
from groundup.diagnostics.examination import examine
from groundup.diagnostics.subject import gpt2_subject
from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.recipes import doctor as recipe
from groundup.recipes import doctor_alike
from groundup.recipes.doctor import NAMES, doctor, line_of, summary_of
from groundup.recipes.doctor_case import Case, open_case, settings_of_run
from groundup.tracking.learning_rate_picture import draw_range
from groundup.training.step import train_step
from tests.conftest import TINY, make_text
from tests.runs import contents

OPTIONS = {**TINY, "n_embd": 32, "learning_rate": 3e-3, "max_steps": 120, "eval_steps": 20, "save_steps": 60}
QUICK = ["data", "run", "equivalence"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a run that has learned it."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "text.txt").write_text(make_text(16_000), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundup.recipes.train.draw_curves", lambda *arguments: None)
        patch.setattr("os.fsync", lambda descriptor: None)
        groundup.train(folder / "text.txt", folder / "run", **OPTIONS)
    return folder


def given(**options: Any) -> Settings:
    return resolve(DOCTOR_GROUPS, {name: Given(value, f"argument {name}") for name, value in options.items()})


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in result["checks"]}


def opened(source: Path, **options: Any) -> AbstractContextManager[Case]:
    return open_case([str(source)], given(**options), lambda line: None)


@pytest.mark.usefixtures("quick")
def test_a_healthy_run_passes_and_is_not_touched(folder: Path) -> None:
    before = contents(folder / "run")
    result = groundup.doctor(folder / "run", checks=QUICK, verify_resume=True)
    assert result["failed"] == []
    assert result["passed"]
    assert contents(folder / "run") == before
    found = by_name(result)
    assert set(found) == {*NAMES["data"], *NAMES["run"], *NAMES["equivalence"]}
    assert found["run_reference"]["passed"] is None  # nothing is known of this text
    assert "bit for bit" in found["resume"]["expected"]
    json.dumps(result, allow_nan=False)


@pytest.mark.usefixtures("quick")
def test_a_run_is_examined_with_its_own_weights_batch_and_optimizer(folder: Path) -> None:
    with opened(folder / "run") as case:
        saved = groundup.load(folder / "run").model
        for name, parameter in case.subject.model.named_parameters():
            assert torch.equal(parameter, saved.get_parameter(name))
        assert case.subject.trained
        assert case.subject.learning_rate == OPTIONS["learning_rate"]
        assert case.subject.inputs.shape == (4, OPTIONS["n_positions"])
        assert torch.equal(case.subject.inputs[:, 1:], case.subject.labels[:, :-1])
        assert case.plan.total_steps == OPTIONS["max_steps"]
        assert case.rows
        checks = {check.name: check for check in examine(case.subject, ["model"])}
        assert checks["initial_loss"].passed is not False
        assert checks["decay_groups"].passed


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_is_examined_as_its_run(folder: Path) -> None:
    first = checkpoints(folder / "run")[0]
    with opened(first) as case:
        assert torch.equal(
            case.subject.model.get_parameter("wte.weight"), groundup.load(first).model.get_parameter("wte.weight")
        )


@pytest.mark.usefixtures("quick")
def test_text_is_examined_as_a_training_would_start_with_it(folder: Path) -> None:
    options = {**OPTIONS, "checks": ["data", "equivalence", "targets"]}
    result = groundup.doctor(folder / "text.txt", **options)
    assert result["passed"]
    found = by_name(result)
    assert set(found) == {*NAMES["data"], "targets", "accumulation", "two_runs_alike"}
    assert [path.name for path in folder.iterdir() if path.name not in ("text.txt", "run")] == []


@pytest.mark.usefixtures("quick")
def test_a_run_that_went_wrong_fails_with_exit_code_1(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = (folder / "run" / "config.toml").read_text(encoding="utf-8").replace(str(folder / "text.txt"), str(tmp_path))
    (run / "config.toml").write_text(text, encoding="utf-8")
    (run / "dataset").symlink_to(folder / "run" / "dataset")
    rows = [{"step": step, "loss": 5.5 - step / 50 if step < 100 else 8.0, "grad_norm": 1.0} for step in range(1, 200)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert command(["doctor", str(run), "--checks", "run_divergence", "--json"]) == 1
    captured = capsys.readouterr()
    (check,) = json.loads(captured.out)["checks"]
    assert check["passed"] is False
    assert check["culprit"] == "diverged"
    assert "no checkpoint" in captured.err
    assert command(["doctor", str(run), "--checks", "run_divergence"]) == 1
    out = capsys.readouterr().out
    assert "✗ run divergence" in out
    assert "→ lower --learning-rate" in out
    assert out.splitlines()[-1] == "0 of 1 checks passed; failed: run_divergence; culprit: diverged"
    assert command(["doctor", str(run), "--checks", "run_skipped_steps"]) == 0


def test_nothing_examines_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", "--checks", "python", "--checks", "disk", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in result["checks"]] == ["python", "disk"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checks", "modle"], "did you mean model?"),
        (["--checks", "modle"], "the groups are machine, data, model"),
        (["--checks", "overfit"], "need a run or text"),
        (["--picture", "range.jpg"], "is no .png"),
        (["nowhere.txt"], "not found"),
    ],
)
def test_what_cannot_be_examined_is_an_error_of_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command(["doctor", *arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]
    assert code in (2, 3)
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.usefixtures("quick")
def test_a_run_whose_data_is_gone_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    text = (folder / "run" / "config.toml").read_text(encoding="utf-8")
    (tmp_path / "run" / "config.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the dataset of .* is gone"):
        groundup.doctor(tmp_path / "run", checks=["data"])


def test_options_given_now_win_over_those_of_the_run(folder: Path) -> None:
    settings = settings_of_run(folder / "run", given(learning_rate=0.5))
    assert settings.flat()["learning_rate"] == 0.5
    assert settings[ModelOptions].n_embd == OPTIONS["n_embd"]
    assert settings[OptimizerOptions].weight_decay == OptimizerOptions().weight_decay


@pytest.mark.usefixtures("quick")
def test_accumulation_that_depends_on_the_cut_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(folder / "text.txt", **{**OPTIONS, "resid_pdrop": 0.1, "attn_pdrop": 0.1}) as case:
        assert doctor_alike.accumulation_check(case).passed  # dropout is none of its business
        real = train_step

        def mean_of_passes(learner: Any, batch: Any, passes: Any, **known: Any) -> Any:
            """As a loop that forgets to divide."""
            return real(learner, batch, passes, **{**known, "learning_rate": known["learning_rate"] * len(passes)})

        monkeypatch.setattr(doctor_alike, "train_step", mean_of_passes)
        check = doctor_alike.accumulation_check(case)
        assert check.passed is False
        assert check.culprit == "accumulation"


@pytest.mark.usefixtures("quick")
def test_batch_norm_is_said_to_depend_on_the_cut(folder: Path) -> None:
    with opened(folder / "text.txt", **{**OPTIONS, "norm": "batch"}) as case:
        assert doctor_alike.accumulation_check(case).passed is None


def test_trainings_that_differ_are_told_apart() -> None:
    one = doctor_alike.Trial((3.0, 2.0), (1.0, 1.0), (torch.ones(2),), 1.0)
    other = doctor_alike.Trial((3.0, 2.5), (1.0, 1.0), (torch.ones(2),), 1.0)
    weights = doctor_alike.Trial((3.0, 2.0), (1.0, 1.0), (torch.tensor([1.0, 1.5]),), 1.0)
    assert doctor_alike.alike_check(one, one).passed
    assert "from step 2 on" in doctor_alike.alike_check(one, other).measured
    assert "up to 5.0e-01" in doctor_alike.resume_check(one, weights).measured
    assert doctor_alike.resume_check(one, weights).passed is False


def test_every_check_that_is_made_has_its_name_in_the_list() -> None:
    """Names that --checks takes are written down, because making them takes long; here they are held against what is made."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=31, n_layer=1, n_head=1, n_embd=8, n_positions=8))
    tokens = torch.randint(31, (2, 9))
    made: dict[str, list[str]] = {"model": [], "gradients": []}
    for check in examine(gpt2_subject(model, tokens[:, :-1], tokens[:, 1:], learning_rate=1e-3), list(made)):
        made[check.group].append(check.name)
    assert {group: set(names) for group, names in made.items()} == {group: set(NAMES[group]) for group in made}
    names = [name for group in NAMES.values() for name in group]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_everything_about_a_healthy_run(folder: Path, tmp_path: Path) -> None:
    shown: list[Check] = []
    picture = tmp_path / "range.png"
    result = doctor([str(folder / "run")], given(picture=str(picture)), lambda line: None, shown.append)
    assert result["failed"] == []
    assert [check.as_json() for check in shown] == result["checks"]
    made = {check["name"] for check in result["checks"]}
    assert made == {name for group, names in NAMES.items() if group != "machine" for name in names} - {"resume"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_a_person_reads() -> None:
    good = Check("initial_loss", "model", True, "5.55", "5.55 ± 0.5")
    bad = Check("targets", "model", False, "t: 100%", "t+1", "shift the labels", "target_not_shifted")
    unknown = Check("resume", "equivalence", None, "not tried", "equal")
    assert line_of(good) == "  ✓ initial loss               5.55"
    assert line_of(bad).splitlines()[1:] == ["      expected t+1", "      → shift the labels"]
    assert line_of(unknown).startswith("  – resume")
    result = {"checks": [check.as_json() for check in (good, bad, unknown)], "failed": ["targets"],
              "culprits": ["target_not_shifted"]}  # fmt: skip
    assert summary_of(result) == ("1 of 3 checks passed, 1 without a verdict; failed: targets; culprit: target_not_shifted")


def test_no_range_is_no_picture(tmp_path: Path) -> None:
    assert not draw_range({}, tmp_path / "range.png")
    assert draw_range({"learning_rates": [1e-4, 1e-3], "losses": [5.0, 4.0], "low": 1e-4, "high": 1e-3}, tmp_path / "range.png")
    assert (tmp_path / "range.png").is_file()


def test_without_a_choice_everything_is_examined_but_the_resume() -> None:
    assert recipe.chosen_of(given()[DOCTOR_GROUPS[0]], {}).has("overfit")


def test_what_is_wrong_with_a_configuration_is_said(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    config = run / "config.toml"

    def refusal(path: Path) -> str:
        with pytest.raises(ConfigError) as caught, opened(path):
            pass
        return str(caught.value)

    config.write_bytes(b"")
    assert f"{config} is empty" in refusal(run)
    config.write_bytes(bytes(range(128, 256)))
    assert f"{config} is not a run's or is damaged" in refusal(run)
    assert f"{config} is not a run's or is damaged" in refusal(checkpoints(run)[-1])
    config.unlink()
    assert f"there is no {config}" in refusal(run)
    config.mkdir()
    assert f"{config} is no file" in refusal(run)
