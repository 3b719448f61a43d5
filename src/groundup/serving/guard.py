"""
What a request must be to be answered at all: meant for this server, and asked by this server's own page.

The server listens on 127.0.0.1, but every web page in the user's browser can send requests there. A name that somebody else
points at 127.0.0.1 (DNS rebinding) shows in Host; a page from elsewhere shows in Origin and Sec-Fetch-Site.
"""

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Any port: at the other end of an ssh tunnel it is another one.
HOST = re.compile(rb"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
READING, ASKING = (b"GET", b"HEAD"), b"POST"
EVERYWHERE = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
)
NOTHING_ALLOWED = b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def refusal(method: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    """
    Why a request is not answered, as a status and a line; None where it is.

    Args:
        headers: their names in lower case.
    """
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value.strip())
    host = values.get(b"host", [])
    if len(host) != 1 or not HOST.fullmatch(host[0]):
        return 421, "this server answers to 127.0.0.1 and localhost alone"
    if any(origin.lower() != b"http://" + host[0].lower() for origin in values.get(b"origin", [])):
        return 403, "asked by a page from elsewhere"
    # A link that somebody follows is no harm; everything else that another site starts is refused.
    followed = method in READING and values.get(b"sec-fetch-mode") == [b"navigate"]
    if not followed and any(site not in (b"same-origin", b"none") for site in values.get(b"sec-fetch-site", [])):
        return 403, "asked by a page from elsewhere"
    if method not in (*READING, ASKING):
        return 405, "only GET, HEAD and POST are known here"
    return None


class Guard:
    """Answers what ``refusal`` refuses, and adds the headers that keep a browser careful to every other answer."""

    def __init__(self, app: "ASGIApp"):
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """One request."""
        if scope["type"] != "http":
            return  # no web socket is answered; there is no start-up to be told of

        async def careful(message: "Message") -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = [*EVERYWHERE, (b"content-security-policy", NOTHING_ALLOWED), (b"cache-control", b"no-store")]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in given)]
            await send(message)

        problem = refusal(scope["method"].encode(), scope["headers"])
        if problem is None:
            await self._app(scope, receive, careful)
            return
        status, line = problem
        body = b"" if scope["method"] == "HEAD" else f"{line}\n".encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        # What was sent along is not read, so the connection ends.
        headers += [(b"connection", b"close"), *([(b"allow", b"GET, HEAD, POST")] if status == 405 else [])]
        await careful({"type": "http.response.start", "status": status, "headers": headers})
        await careful({"type": "http.response.body", "body": body})


def policy_of(html: str) -> str:
    """The Content-Security-Policy of a page that holds all it needs: its own scripts and styles, by their sha256, no others."""
    parts = _Parts()
    parts.feed(html)
    allowed = {kind: " ".join(map(_hash, texts)) or "'none'" for kind, texts in parts.found.items()}
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Parts(HTMLParser):
    """Collects what stands in script and style elements that a browser would obey."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.found: dict[str, list[str]] = {"script": [], "style": []}
        self._inside: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One begins, unless it is data."""
        obeyed = dict(attrs).get("type") in (None, "", "module", "text/javascript", "text/css")
        self._inside = self.found[tag] if tag in self.found and obeyed else None
        if self._inside is not None:
            self._inside.append("")

    def handle_endtag(self, tag: str) -> None:
        """One ends."""
        self._inside = None

    def handle_data(self, data: str) -> None:
        """A piece of its text."""
        if self._inside is not None:
            self._inside[-1] += data
