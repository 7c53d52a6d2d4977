"""Which hosts answered in this process, and which cannot be reached at all.

A host that answered before is tried again when its name is suddenly unknown or it refuses: that may
be over in a moment. One that never did is misspelt, switched off, or behind a wall.
"""

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_session
from huggingface_hub.utils import httpx

CONNECT_S = 10.0
_HOPELESS = (socket.gaierror, ConnectionRefusedError)
_answered: set[str] = set()


def watched_session() -> Any:
    """Return the session of huggingface_hub, whose answers are noted from now on.

    By itself it waits for a connection as long as the system does, which is minutes of silence.
    """
    session = get_session()
    if session.timeout == httpx.Timeout(None):
        session.timeout = httpx.Timeout(None, connect=CONNECT_S)
    hooks = session.event_hooks["response"]
    if _note not in hooks:
        hooks.append(_note)
    return session


def _note(response: Any) -> None:
    _answered.add(_host(str(response.request.url)))


def host_out_of_reach(error: BaseException) -> str:
    """Return the host that an error is about, if it never answered and cannot be reached at all.

    That is: its name does not resolve, or it refuses the connection. Otherwise empty.
    """
    chain = list(_causes(error))
    if not any(isinstance(each, _HOPELESS) for each in chain):
        return ""
    host = next(filter(None, map(_host_of, chain)), "")
    return "" if host in _answered else host


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _host_of(error: BaseException) -> str:
    with suppress(AttributeError, RuntimeError):  # the client's errors know it, or raise
        return _host(str(error.request.url))  # type: ignore[attr-defined]
    return ""


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname or ''}:{parts.port}" if parts.port else parts.hostname or ""
