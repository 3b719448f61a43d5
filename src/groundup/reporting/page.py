"""One HTML page that holds everything it shows: no request leaves it."""

from collections.abc import Mapping
from typing import Any


def page(data: Mapping[str, Any], *, live: bool = False) -> str:
    """
    The page as HTML.

    Args:
        data: from ``groundup.reporting.data.page_data``.
        live: ask the server that this page came from for ``data.json``, the same value made anew, every three seconds, with
            ``If-None-Match``; and show a link to its ``tokens``.
    """
    return "<!doctype html>"
