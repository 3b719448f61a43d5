"""The page and the pictures of a report: whole, closed to the outside, and drawn by a real browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from groundup.cli.main import run as command
from groundup.reporting.data import page_data, run_data
from groundup.reporting.page import SCRIPTS, STYLES, page
from tests.test_report import GOOD_COURSE, OVERFITTED, course, eval_row, falling, make_run, step_row

HOSTILE = "</script><script>alert('got in')</script><img src=x onerror=alert(1)>\u2028\u2029<!--{{data}}{{script}}"
VENDOR = files("groundup.reporting") / "vendor"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEALTH = {"grad_norm": {"wte": 1.0, "h.0": 0.01, "h.1": None}, "dead_units": {"h.0": 0.0, "h.1": 0.0}}


def full_run(folder: Path, name: str = "run", **options: Any) -> Path:
    """A run that has something of everything."""
    rows = course(falling(5, 2), {25: 4.0, 50: 3.0, 75: 2.5, 100: 2.2})
    rows = [{**row, "health": HEALTH, "spike": {}} if row["step"] % 20 == 0 and "loss" in row else row for row in rows]
    run = make_run(folder / name, rows, **options)
    (run / "samples.jsonl").write_text(json.dumps({"step": 50, "prompt": "Once ", "text": HOSTILE}) + "\n", encoding="utf-8")
    (run / "dataset").mkdir()
    split = {"tokens": 1000, "bytes": 4000, "documents": 3}
    (run / "dataset" / "dataset.json").write_text(json.dumps({"vocab_size": 257, "splits": {"train": split}}))
    return run


def embedded(content: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


# --- the page ---


def test_what_a_model_wrote_stays_text(tmp_path):
    run = full_run(tmp_path, source=HOSTILE)
    content = page(page_data([run_data(run)]))
    assert embedded(content)["runs"][0]["samples"][0]["text"] == HOSTILE
    # Two scripts, the data and the code; what the texts say of more of them is spelled so that no parser sees it.
    assert content.count("<script") == content.count("</script>") == 2
    assert "<img" not in content
    assert "\u2028" not in content


def test_a_name_is_escaped_in_the_title(tmp_path):
    run = make_run(tmp_path / "a<b>&\"'", GOOD_COURSE)
    assert f"<title>{html.escape(run.name, quote=False).replace(chr(34), '&quot;')} — groundup</title>" in page(
        page_data([run_data(run)])
    )


def test_the_policy_allows_the_pages_own_script_and_style_alone(tmp_path):
    content = page(page_data([run_data(make_run(tmp_path / "run", GOOD_COURSE))]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)
    assert policy is not None
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        block = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        assert len(block) == 1
        digest = base64.b64encode(hashlib.sha256(block[0].encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy[1]
    assert policy[1].startswith("default-src 'none';")
    assert "connect-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]


def test_a_live_page_may_ask_its_own_server_and_no_other_page_may(tmp_path):
    data = page_data([run_data(make_run(tmp_path / "run", GOOD_COURSE))])
    assert "connect-src 'self'" in page(data, live=True)
    assert 'data-live="live"' in page(data, live=True)
    assert 'data-live=""' in page(data)


def test_our_scripts_never_make_html_of_text():
    for name in SCRIPTS:
        if not name.startswith("vendor/"):
            content = files("groundup.reporting").joinpath(name).read_text(encoding="utf-8")
            for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
                assert unsafe not in content, f"{name}: {unsafe}"


def test_the_page_names_its_language_and_every_section(tmp_path):
    content = page(page_data([run_data(make_run(tmp_path / "run", GOOD_COURSE))]))
    assert '<html lang="en"' in content
    for name in re.findall(r'aria-labelledby="([^"]+)"', content):
        assert f'id="{name}"' in content


def test_twenty_long_runs_are_less_than_three_megabytes(tmp_path):
    blocks = {f"h.{layer}": 0.123456 * layer for layer in range(48)}
    rows = [
        step_row(
            step,
            2 + step % 13 / 7,
            grad_norm=1 + step % 17 / 9,
            tokens_per_second=1000 + step % 19 / 3,
            **({"health": {"grad_norm": blocks, "dead_units": blocks}} if step % 5 == 0 else {}),
        )
        for step in range(1, 3001)
    ]
    make_run(tmp_path / "run", rows)
    data = run_data(tmp_path / "run", 12_000 // 20)
    assert len(page(page_data([{**data, "path": f"{number}/run"} for number in range(20)]))) < 3_000_000


def test_the_library_is_as_it_was_released():
    stated = dict(
        re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set(stated) == {Path(name).name for name in (*SCRIPTS, *STYLES) if name.startswith("vendor/")}
    for name, digest in stated.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
    assert "MIT License" in (VENDOR / "LICENSE-uPlot.txt").read_text(encoding="utf-8")


def test_what_the_page_is_made_of_is_installed():
    """The wheel carries what package-data names."""
    import fnmatch
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["groundup.reporting"]
    for name in (*SCRIPTS, *STYLES, "page.html", "vendor/LICENSE-uPlot.txt"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


# --- the verb ---


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.slow
def test_a_report_is_written_into_the_run(tmp_path, capsys):
    run = full_run(tmp_path)
    assert command(["report", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["page"] == str(run / "report.html")
    assert {Path(path).name for path in result["pictures"]} == {
        f"report-{name}.png" for name in ("learning-rate", "gradient-norm", "speed", "health")
    }
    for path in result["pictures"]:
        assert min(png_size(Path(path))) > 200
    assert result["runs"][0]["totals"]["best_evaluation"]["step"] == 100
    # The page has what the doctor says of the same rows.
    checks = embedded((run / "report.html").read_text(encoding="utf-8"))["runs"][0]["findings"]
    assert {"run_progress", "run_overfitting"} <= {check["name"] for check in checks}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_names_that_no_picture_can_hold_are_drawn_as_they_can_be(tmp_path, capsys):
    health = {"$\\frac{x": {"$\\bad{": 1.0, "\ud800": 2.0, "a\x1bb": 3.0, "日本": 1e-310}}
    run = make_run(tmp_path / "\x1b[31mRED\n$x_日", [step_row(step, health=health) for step in (1, 2)])
    assert command(["report", str(run)]) == 0
    out = capsys.readouterr()
    assert "not drawn" not in out.err
    assert len(out.err.splitlines()) == 1, "a line break in a name makes no second line"
    assert (run / "report-health.png").is_file()


def test_a_picture_that_cannot_be_drawn_costs_only_itself(tmp_path, capsys, monkeypatch):
    run = full_run(tmp_path)

    def fails(*arguments: Any) -> bool:
        assert (run / "report.html").is_file(), "the page is there first"
        raise OverflowError("too large")

    monkeypatch.setattr("groundup.reporting.pictures.draw_gradient_norm", fails)
    assert command(["report", str(run)]) == 0
    assert "report-gradient-norm.png: not drawn (OverflowError: too large)" in capsys.readouterr().err
    assert (run / "report-speed.png").is_file()
    assert not (run / "report-gradient-norm.png").exists()


def test_several_runs_are_laid_over_one_another(tmp_path, capsys, monkeypatch):
    runs = [full_run(tmp_path / "a"), make_run(tmp_path / "b" / "run", OVERFITTED), make_run(tmp_path / "c", [])]
    output = tmp_path / "new" / "folder" / "all.html"
    # Named twice, a run is shown once.
    assert command(["report", *map(str, runs), str(runs[0]), "--output", str(output)]) == 0
    assert [run["label"] for run in embedded(output.read_text(encoding="utf-8"))["runs"]] == ["a/run", "b/run", "c"]
    assert sorted(path.name for path in output.parent.glob("*.png")) == sorted(
        f"all-{name}.png" for name in ("loss", "learning-rate", "gradient-norm", "speed", "health-1")
    )
    monkeypatch.chdir(tmp_path)
    assert command(["report", "b/run", "c"]) == 0
    assert (tmp_path / "report.html").is_file()


def test_a_run_that_has_just_begun_has_a_page(tmp_path, capsys):
    run = make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    assert command(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"page: {run / 'report.html'}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run: nowhere (given as RUN) does not exist; give the --output-dir of a training"),
        (["file"], "run: file (given as RUN) is a file; give the --output-dir of a training"),
        (
            ["folder"],
            "run: folder (given as RUN) is no run: it has neither the config.toml nor the metrics.jsonl of one; give the "
            "--output-dir of a training",
        ),
        (
            ["run", "--output", "folder.html"],
            "report: cannot write folder.html (Is a directory); choose a place that you may write",
        ),
        (["run", "--output", "page.pdf"], "output: page.pdf (from --output) is no .html; name a file that ends so"),
        (["run", "--output", "file/page.html"], "--output: cannot make file (File exists); choose a folder that you may write"),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.html").mkdir()
    make_run(tmp_path / "run", [eval_row(0, 5.0)])
    assert command(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"groundup: {message}\n"


# --- a browser ---


def rendered(path: Path, profile: Path, width: int = 1400) -> tuple[str, list[str]]:
    """The page's elements after its script has run, and what the browser's console says."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_it_without_an_error(tmp_path):
    runs = [full_run(tmp_path / "a", max_steps=100), make_run(tmp_path / "b" / "run", OVERFITTED, learning_rate=0.1)]
    (tmp_path / "page.html").write_text(page(page_data([run_data(run) for run in runs])), encoding="utf-8")
    drawn, console = rendered(tmp_path / "page.html", tmp_path / "profile")
    assert console == []
    assert "Learned, then overfitted" in drawn
    assert drawn.count('class="uplot') == 7
    assert "What was set differently" in drawn
    # The sample is there, as text.
    assert html.escape(HOSTILE[:60], quote=False) in drawn
    assert "got in" not in re.sub(r"<script.*?</script>|<pre.*?</pre>", "", drawn, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_runs_that_have_nothing_or_nonsense(tmp_path):
    odd = [
        step_row(1, None, grad_norm=None),
        step_row(2, None, grad_norm=0.0),
        eval_row(2, None),
        step_row(3, 0.0, health={"grad_norm": {}, "strange": {"<b>": None}}),
    ]
    runs = [make_run(tmp_path / "empty", []), make_run(tmp_path / "odd", odd), make_run(tmp_path / "one", [step_row(1)])]
    (tmp_path / "page.html").write_text(page(page_data([run_data(run) for run in runs])), encoding="utf-8")
    drawn, console = rendered(tmp_path / "page.html", tmp_path / "profile", width=390)
    assert console == []
    assert "This run holds no logged step" in drawn
