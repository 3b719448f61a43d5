"""
Links that leave docs/, followed: a hook of MkDocs (https://www.mkdocs.org/user-guide/configuration/#hooks).

The pages are read in two places: in the repository, where ../../benchmarks/README.md and ../../src/… are files, and as a site,
which holds docs/ alone. So a file of the repository that a page links to becomes a page of the site, under repository/: a
Markdown file as it is, any other as a block of code. Links are rewritten to match; a link to nothing is left for MkDocs to
report.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
FOLDER = "repository"
LANGUAGES = {".py": "python", ".sh": "sh", ".toml": "toml"}

_home: dict[str, str] = {}
"""Where each page of the site stands in the repository, by its address in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what that links to."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir).name
    _home.clear()
    _home.update({page.src_uri: f"{docs}/{page.src_uri}" for page in files.documentation_pages()})
    waiting = list(_home.items())
    while waiting:
        address, home = waiting.pop()
        for target in _targets((root / home).read_text(encoding="utf-8"), home):
            new = _address(target, docs)
            if new in _home or target.startswith(f"{docs}/") or not (root / target).is_file():
                continue
            files.append(File.generated(config, new, content=_content(root / target, target)))
            _home[new] = target
            if target.endswith(".md"):
                waiting.append((new, target))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between docs/ and the rest of the repository to where those files are in the site."""
    docs, here = Path(config.docs_dir).name, page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        target = _resolved(link[1], _home[here])
        new = _address(target, docs) if target else ""
        return os.path.relpath(new, PurePosixPath(here).parent) if files.get_file_from_path(new) else link[1]

    return "".join(text if fenced else LINK.sub(rewritten, text) for text, fenced in _parts(markdown))


def _parts(markdown: str) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is a block of code, in which nothing is a link."""
    parts, position = [], 0
    for block in FENCE.finditer(markdown):
        parts += [(markdown[position : block.start()], False), (block[0], True)]
        position = block.end()
    return [*parts, (markdown[position:], False)]


def _targets(markdown: str, home: str) -> list[str]:
    links = (link[1] for text, fenced in _parts(markdown) if not fenced for link in LINK.finditer(text))
    return [target for link in links if (target := _resolved(link, home))]


def _resolved(link: str, home: str) -> str:
    """The path in the repository that a link of a file means; empty where it leaves the repository."""
    path = os.path.normpath(PurePosixPath(home).parent / link)
    return "" if path.startswith("..") else path


def _address(target: str, docs: str) -> str:
    """Where a file of the repository is in the site."""
    if target.startswith(f"{docs}/"):
        return target.removeprefix(f"{docs}/")
    return f"{FOLDER}/{target}" if target.endswith(".md") else f"{FOLDER}/{target}.md"


def _content(file: Path, target: str) -> str:
    text = file.read_text(encoding="utf-8")
    if target.endswith(".md"):
        return text
    return f"# {target}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"
