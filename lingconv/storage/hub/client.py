"""Talking to the Hub, through huggingface_hub: its login, its endpoint, its session.

The network fails, servers are busy, and signed links run out. Whatever may be over in a moment is
tried again, with growing pauses, or after as long as the server asks for; the rest becomes an error
of lingconv's own tree. No message repeats a header, a token or a signed link.
"""

import json
import os
import random
import re
import time
from collections.abc import Callable
from json import JSONDecodeError
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, logging

from lingconv.errors import (
    SAME_COMMAND,
    CheckpointError,
    LingconvError,
    NetworkError,
    PermissionDenied,
    ResourceError,
    UsageError,
)
from lingconv.storage.client_logs import Overheard, listen
from lingconv.storage.hub.contact import host_out_of_reach, watched_session
from lingconv.storage.retries import Retry, tell
from lingconv.version import __version__

T = TypeVar("T")

TRIES = 9
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
LONGEST_ASKED_S = 900.0
REFUSED = (400, 401, 403, 404, 410)  # what stores answer to a link that ran out
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_STRUCK_OUT = "***"
_SECRETS = (
    re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{8,}"),
    re.compile(r"(?i:bearer|basic)\s+[A-Za-z0-9+/=_.~%-]{8,}"),
    re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://\S+"),
)
_MAX_SAID = 500
# What the client logs of its own tries: huggingface_hub 1.x, utils/_http.py and file_download.py.
_AT = r"\w+://(?P<host>[^/:?\s]+)"
_CLIENT_LOGS = (
    Overheard(
        ("huggingface_hub.utils._http",),
        "the Hub",
        re.compile(rf"(?s)^(?P<reason>.*) thrown while requesting \w+ {_AT}"),
        re.compile(r"(?:Retrying in|Waiting) (?P<wait>[\d.]+)s.*(?P<failures>\d+)/(?P<most>\d+)"),
    ),
    Overheard(
        ("huggingface_hub.file_download",),
        "the Hub",
        re.compile(rf"(?s)^Error while downloading from {_AT}\S*: (?P<reason>.*)\n"),
        re.compile(r"Trying to resume download"),
    ),
)
_LOG_IN = "run `hf auth login`, or set `HF_TOKEN`"


class Unfinished(Exception):
    """An answer that was cut short, or is not the one that was asked for: worth another try."""


class Backoff:
    """How often something at an address failed in a row, and the wait before the next try."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._failures = 0

    def reset(self) -> None:
        """Forget the failures: something went well."""
        self._failures = 0

    def pause(self, error: Exception) -> bool:
        """Say so and wait after `error`; return False at once where another try is of no use."""
        self._failures += 1
        if not is_passing(error) or self._failures >= TRIES:
            return False
        growing = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self._failures - 1))
        asked = _asked_wait(error)
        wait = growing * random.uniform(0.5, 1.0) if asked is None else asked
        tell(Retry(self._uri, _reason(error), wait, self._failures, TRIES))
        time.sleep(wait)
        return True


def patiently(uri: str, action: Callable[[], T]) -> T:
    """Return what `action` returns, which is tried again while the network is to blame.

    Raises an error of `lingconv.errors` that names `uri`.
    """
    backoff = Backoff(uri)
    while True:
        watched_session()
        try:
            return action()
        except LingconvError:
            raise
        except Exception as exc:
            if not backoff.pause(exc):
                raise translated(exc, uri) from Cause(exc)


class Cause(Exception):
    """What the client's error said, in place of it: its own text may hold a token or a link."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {without_secrets(str(error))}")


def without_secrets(text: str) -> str:
    """Return what a server or a client said without tokens and links, and not too much of it.

    The token that is in use is struck out however it is written, and whatever looks like one.
    """
    token = get_token() or ""
    for form in (token, quote(token, safe=""), json.dumps(token)[1:-1]):
        text = text.replace(form, _STRUCK_OUT) if form else text
    # Percent-escapes of letters that need none hide it from the comparison above.
    if token and token in unquote(text):
        text = unquote(text).replace(token, _STRUCK_OUT)
    for secret in _SECRETS:
        text = secret.sub(_STRUCK_OUT, text)
    return text if len(text) <= _MAX_SAID else f"{text[:_MAX_SAID]} ..."


def hub_api() -> HfApi:
    """Return the client of the Hub, which says in its requests who is asking.

    What it would tell of its tries holds signed links; lingconv says itself what is worth saying.
    """
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity(logging.ERROR)
    for overheard in _CLIENT_LOGS:
        listen(overheard, logging.WARNING, without_secrets)
    return HfApi(library_name="lingconv", library_version=__version__)


def _response_of(error: BaseException | None) -> Any:
    """Return the answer that an error or its cause is about; None when there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response
        error = error.__cause__ or error.__context__
    return None


def status_of(error: BaseException) -> int:
    """Return the HTTP status that an error or its cause is about; 0 when there is none."""
    response = _response_of(error)
    return int(response.status_code) if response is not None else 0


def _is_old_link(error: BaseException) -> bool:
    """Return whether a store refused a signed link: it ran out, the Hub gives a new one."""
    response = _response_of(error)
    if response is None or response.status_code not in REFUSED:
        return False
    return not str(response.request.url).startswith(constants.ENDPOINT)


def is_passing(error: Exception) -> bool:
    """Return whether an error may be over in a moment."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if status:
        return status in _BUSY or _is_old_link(error)
    if host_out_of_reach(error):
        return False
    # The client reads some answers as JSON before it looks at their status.
    if isinstance(error, Unfinished | httpx.TransportError | JSONDecodeError):
        return True
    # Uploads wrap what went wrong; another thread may have closed the session that all share.
    cause = error.__cause__
    closed = isinstance(error, RuntimeError) and "closed" in str(error)
    return closed or (isinstance(cause, Exception) and is_passing(cause))


def _asked_wait(error: BaseException) -> float | None:
    """Return the seconds that the server asks to wait for."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(text), LONGEST_ASKED_S) if text.isdigit() else None


def translated(error: Exception, uri: str) -> LingconvError:
    """Return an error of lingconv's tree in place of the client's."""
    status = status_of(error)
    if _is_old_link(error):
        text = f"{uri}: no luck after {TRIES} tries: the store answers {status}"
        return NetworkError(text, hint=SAME_COMMAND)
    if isinstance(error, OfflineModeIsEnabled):
        return NetworkError(
            f"{uri} cannot be reached: HF_HUB_OFFLINE is set", hint="unset it, or name a folder"
        )
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None:
        return NetworkError(
            f"{uri} is not in the local cache, and HF_HUB_OFFLINE is set",
            hint="unset it, or download the repository first",
        )
    if isinstance(error, GatedRepoError):
        return PermissionDenied(
            f"{uri} is gated: its owner has to let you in",
            hint=f"ask for access on its page, then {_LOG_IN}",
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{uri}: there is no such revision", hint="see the repository's branches")
    if isinstance(error, RemoteEntryNotFoundError):
        return CheckpointError(f"{uri} is not there any more", hint=SAME_COMMAND)
    if isinstance(error, RepositoryNotFoundError):
        return PermissionDenied(
            f"{uri} is not there, or is private and not yours to see",
            hint=f"check its name; for a private one, {_LOG_IN}",
        )
    if isinstance(error, DisabledRepoError) or status in (401, 403):
        return PermissionDenied(f"{uri}: the Hub refuses it ({_said(error)})", hint=_LOG_IN)
    if status == 413 or status == 507:
        return ResourceError(f"{uri}: the Hub has no room for it ({_said(error)})")
    if status and status not in _BUSY:
        return NetworkError(f"{uri}: the Hub answers {status} ({_said(error)})", hint=SAME_COMMAND)
    if host := host_out_of_reach(error):
        return NetworkError(
            f"{uri}: {host} cannot be reached: {_plain(error)}",
            hint="check the network and `HF_ENDPOINT`, then run the same command again",
        )
    tried = f"no luck after {TRIES} tries: " if is_passing(error) else ""
    return NetworkError(f"{uri}: {tried}{_reason(error)}", hint=SAME_COMMAND)


def _reason(error: BaseException) -> str:
    """Return why a request failed, on one line and without secrets."""
    status = status_of(error)
    if not status:
        return _plain(error)
    return f"the {'store' if _is_old_link(error) else 'Hub'} answers {status}"


def _said(error: Exception) -> str:
    """Return what the server said, without the links that the client adds."""
    if isinstance(error, HfHubHTTPError) and error.server_message:
        return without_secrets(error.server_message)
    return f"HTTP {status_of(error)}"


def _plain(error: BaseException) -> str:
    """Return the kind of an error's first cause and what it says, unless that may hold a link."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).splitlines()[0] if str(error) else ""
    return type(error).__name__ if not text or "://" in text else without_secrets(text)
