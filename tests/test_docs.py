"""The documentation: the site builds and asks nobody for anything; what the tutorials show is what happens."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.pages import blocks, difference, run_page

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
BLOCKS = [(page.name, block) for page in TUTORIALS for block in blocks(page)]

# ---- the tutorials


# Blocks that no test can run, each with its reason, as the pages say.
NOT_RUN = [
    ("first-model.md", "installs"),
    ("gpt2-in-one-afternoon.md", "downloads OpenAI's weights"),
    ("gpt2-in-one-afternoon.md", "hours on a GPU, and gigabytes of text"),
    ("when-training-goes-wrong.md", "it stays until Ctrl-C"),
    ("when-training-goes-wrong.md", "a minute or two of training"),
]


def test_what_is_not_run_is_known():
    assert [(page, block.notes["not run"]) for page, block in BLOCKS if "not run" in block.notes] == NOT_RUN


def test_every_comment_is_understood_and_every_page_runs_something():
    for page in TUTORIALS:
        comments = re.findall(r"^<!--.*", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(comments) == sum(len(block.notes) for name, block in BLOCKS if name == page.name), page
        assert any(block.is_run for name, block in BLOCKS if name == page.name)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_what_a_tutorial_shows_is_what_happens(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # waiting for the disk is tested elsewhere
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    run_page(page)


# ---- how they are compared


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("loss 4.51\n", "loss 4.53\n", True),
        ("loss 4.51\n", "loss 5.51\n", False),
        ("12 windows\n", "12 windows\n", True),
        ("12 windows\n", "13 windows\n", False),
        ("1.5e-04\n", "1.6e-04\n", False),
        ("12% | 900 tok/s | eta 3m05s\n", "12% | 1,234 tok/s | eta 2s\n", True),
        ("first\n…\nlast\n", "first\nanother\nlast\n", True),
        ("first\n…\nlast\n", "first\nanother\n", False),
        ("first\n", "first\nanother\n", False),
        ("first\nsecond\n", "first\n", False),
        ("read … documents\n", "read 3 documents\n", True),
        ("read … documents\n", "read 3 texts\n", False),
        ("a word\n", "another word\n", False),
        ("…\n", "anything\n", True),
    ],
)
def test_the_comparison_can_fail(shown, printed, same):
    assert (difference(shown, printed) == "") is same


def test_where_numbers_differ_words_do_not():
    assert difference("read 728 documents\n", "read 12 documents\n", numbers=False) == ""
    assert difference("read 728 documents\n", "read 12 texts\n", numbers=False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('```python\nprint("1")\n```\n\n```text\n2\n```\n', "page.md, line 1"),
        ("first\n\n```sh\nfalse\n```\n", "page.md, line 3: exit code 1"),
        ("```sh\ngroundup nothing\n```\n", "exit code 2"),
        ("<!-- exit code 1: reason -->\n\n```sh\ntrue\n```\n", "exit code 0"),
        ("<!-- output differs: reason -->\n```sh\ntrue\n```\n```text\nx\n```\n", "printed nothing"),
    ],
)
def test_a_page_that_is_wrong_fails(text, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=problem):
        run_page(tmp_path / "page.md")


# ---- the site


class Requests(HTMLParser):
    """What a browser fetches for a page; links that a person may follow are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        names = ("src", "srcset", "poster", "data", *(("href",) if tag in ("link", "use", "image") else ()))
        self.found += [value for name, value in attrs if name in names and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built; a warning ends the build."""
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", target],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def test_the_site_asks_no_other_host_for_anything(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        parser = Requests()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found
        assert [link for link in parser.found if re.match(r"(https?:)?//", link)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"""url\(["']?(https?:)?//|@import""", sheet.read_text(encoding="utf-8")), sheet


def test_links_that_leave_the_docs_lead_to_pages(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    for page in (
        "repository/CONTRIBUTING.html",
        "repository/benchmarks/index.html",
        "repository/src/groundup/model/gpt2.py.html",
    ):
        assert f'href="{page}"' in index
        assert (site / page).is_file()
    assert "class" in (site / "repository/src/groundup/model/gpt2.py.html").read_text(encoding="utf-8")


def test_every_page_of_the_docs_is_in_the_site(site):
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs")
        path = path.with_name("index.md") if path.name == "README.md" else path
        assert (site / path.with_suffix(".html")).is_file()
