"""One HTML page that holds everything it shows: no request leaves it."""

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from typing import Any

SCRIPTS = ("vendor/uPlot.iife.min.js", "page.js", "charts.js", "heat_maps.js", "sections.js", "start.js")
STYLES = ("vendor/uPlot.min.css", "page.css")


def page(data: Mapping[str, Any], *, live: bool = False) -> str:
    """
    The page as HTML.

    Its policy allows its own script and style, by hash, and nothing else: a text that a model wrote cannot become a part of it.

    Args:
        data: from ``groundup.reporting.data.page_data``.
        live: ask the server that this page came from for ``data.json``, the same value made anew, every three seconds, with
            ``If-None-Match``; and show a link to its ``tokens``.
    """
    script = "\n".join(_read(name) for name in SCRIPTS)
    style = "\n".join(_read(name) for name in STYLES)
    policy = [
        "default-src 'none'",
        f"script-src '{_hash(script)}'",
        f"style-src '{_hash(style)}'",
        "img-src data:",
        "connect-src 'self'" if live else "connect-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    names = " · ".join(run["label"] for run in data["runs"])
    parts = {
        "policy": "; ".join(policy),
        "title": _escaped(f"{names} — groundup"),
        "live": "live" if live else "",
        "style": style,
        "script": script,
        "data": as_json(data),
    }
    # In one go, so that what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element: in ASCII, without ``<``, so that no text in it can end the element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _read(name: str) -> str:
    return files("groundup.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """As a content security policy names a block of script or style."""
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"


def _escaped(text: str) -> str:
    """Text for HTML; what no UTF-8 can hold, as in a file's name, is replaced."""
    text = text.encode(errors="replace").decode()
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
