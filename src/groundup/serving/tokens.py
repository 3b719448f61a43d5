"""The token view: a page that asks this server what a model expects."""

import html
from importlib.resources import files


def tokens_page(run: str) -> str:
    """The page as HTML, with all that it needs inside. ``run`` is the name to show, as far as UTF-8 can hold it."""
    run = run.encode(errors="replace").decode()
    folder = files("groundup.serving")
    shell, style, script = (folder.joinpath(f"tokens.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return shell.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).replace("RUN_NAME", html.escape(run))
