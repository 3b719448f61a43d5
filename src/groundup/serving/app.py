"""
The web application of ``groundup watch``: pages that are read, and questions about tokens that change nothing.

Which page, which data, which answer: that is handed in. No path from a request is ever opened.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from groundup.errors import GroundupError
from groundup.serving.guard import Guard, policy_of
from groundup.serving.latest import Latest
from groundup.serving.one_at_a_time import BusyError, OneAtATime

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

LONGEST_QUESTION = 256 * 1024
"""Bytes of a question."""
PATIENCE = 10
"""Seconds in which a question must have come whole."""
WAITING = 16
"""Questions that may wait for the one that is being answered."""

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Pages:
    """What is shown."""

    page: Callable[[str], str]
    """The run's page as HTML, from its data as JSON."""
    data: Latest
    """The run's data as JSON."""
    tokens: str
    """The token view as HTML."""
    questions: Mapping[str, Answer]
    """What answers a question of the token view, by its name; raises GroundupError where it cannot."""
    say: Callable[[str], None]
    """Told of every fault of ours, in one line."""


def application(pages: Pages) -> "ASGIApp":
    """
    The application: ``/``, ``/data.json``, ``/tokens``, and a POST to ``/tokens/NAME`` for each question.

    Questions are answered one at a time, on a thread of their own.
    """
    from anyio import to_thread
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    questions = OneAtATime(WAITING)
    faults: set[str] = set()

    def html(text: str) -> "Response":
        return HTMLResponse(text, headers={"content-security-policy": policy_of(text)})

    def refused(status: int, line: str) -> "Response":
        # What was sent along may not have been read to its end, so the connection ends.
        return JSONResponse({"error": line}, status, headers={"connection": "close"} if status != 422 else None)

    async def page(request: "Request") -> "Response":
        found = await to_thread.run_sync(pages.data.now)
        return html(await to_thread.run_sync(pages.page, found.text))

    async def data(request: "Request") -> "Response":
        found = await to_thread.run_sync(pages.data.now)
        headers = {"etag": found.etag, "cache-control": "no-cache"}
        if found.etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=headers)
        return Response(found.text, headers=headers, media_type="application/json")

    async def tokens(request: "Request") -> "Response":
        return html(pages.tokens)

    async def no_icon(request: "Request") -> "Response":
        return Response(status_code=204)

    async def answered(request: "Request", answer: Answer) -> "Response":
        try:
            found = await questions.do(partial(answer, await _question(request)))
        except _UnfitError as error:
            return refused(error.status, str(error))
        except BusyError:
            return refused(503, "busy with other questions; ask again")
        except GroundupError as error:
            return refused(422, str(error))
        return Response(json.dumps(found, allow_nan=False), media_type="application/json")

    async def fault(request: "Request", error: Exception) -> "Response":
        line = f"WARNING: a request failed: {type(error).__name__}: {error}"
        if line not in faults:  # a page asks every few seconds
            faults.add(line)
            pages.say(line)
        return refused(500, "internal error; the terminal of groundup watch says more")

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/data.json", data, methods=["GET"]),
        Route("/tokens", tokens, methods=["GET"]),
        Route("/favicon.ico", no_icon, methods=["GET"]),
        *(
            Route(f"/tokens/{name}", partial(answered, answer=answer), methods=["POST"])
            for name, answer in pages.questions.items()
        ),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={Exception: fault}))


class _UnfitError(Exception):
    """A request that is no question."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


async def _question(request: "Request") -> dict[str, Any]:
    """
    What a request asks.

    Raises:
        _UnfitError: it is no JSON object, too long, or did not come whole.
    """
    from anyio import fail_after
    from starlette.requests import ClientDisconnect

    # No form can send this type, and a script from elsewhere must ask first, which is refused.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _UnfitError(415, "a question is application/json")
    body = b""
    try:
        with fail_after(PATIENCE):
            async for piece in request.stream():
                body += piece
                if len(body) > LONGEST_QUESTION:
                    raise _UnfitError(413, f"a question has at most {LONGEST_QUESTION:,} bytes")
    except (TimeoutError, ClientDisconnect):
        raise _UnfitError(408, "the question did not come whole") from None
    try:
        asked = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise _UnfitError(400, "the question is not JSON") from None
    if not isinstance(asked, dict):
        raise _UnfitError(400, "the question is not a JSON object")
    return asked


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
