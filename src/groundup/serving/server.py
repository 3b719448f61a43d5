"""Serve an application on this machine, until Ctrl-C."""

import contextlib
import errno
import socket
from typing import TYPE_CHECKING

from groundup.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

LOOPBACK = "127.0.0.1"
MOST_CONNECTIONS = 128
LONGEST_HEAD = 16 * 1024
"""Bytes of a request's first line and headers."""


def require_framework() -> None:
    """
    Refuse early where the web framework is missing.

    Raises:
        ConfigError: says how to install it.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"watch: {error.name or 'a package'} is not installed, and it serves the page; pip install 'groundup[watch]'"
        ) from None


def listen(port: int) -> socket.socket:
    """
    A socket on 127.0.0.1, where nobody on the network gets to.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: the port is taken, or not for this user.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
    except OSError as error:
        listening.close()
        why = {errno.EADDRINUSE: "is taken, perhaps by another groundup watch", errno.EACCES: "is not for this user"}
        raise ConfigError(
            f"port: {port} {why.get(error.errno or 0, f'cannot be used ({error.strerror})')}; give another with --port, or "
            "--port 0 for any that is free"
        ) from None
    listening.listen(MOST_CONNECTIONS)
    return listening


def serve(application: "ASGIApp", listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; the socket is closed then."""
    import uvicorn

    config = uvicorn.Config(
        application, http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="critical",
        access_log=False, server_header=False, date_header=False, proxy_headers=False, limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=LONGEST_HEAD, timeout_graceful_shutdown=1,
    )  # fmt: skip
    # uvicorn ends in order, and then raises again the signal that it was ended by.
    with listening, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
