"""What the Hub says of a repository: JSON of a bounded size, in a bounded number of pages.

huggingface_hub reads answers whole and follows pages for as long as there are any; an answer that
is packed a thousand times over, or a list whose next page is itself, would take all memory.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

from lingconv.errors import CheckpointError
from lingconv.storage.hub.client import without_secrets
from lingconv.storage.hub.contact import CONNECT_S, watched_session
from lingconv.storage.upload_target import ListedFile
from lingconv.version import __version__

TIMEOUT = httpx.Timeout(30.0, connect=CONNECT_S)
# A page of the Hub has 1,000 files in some 300 kB.
MAX_ANSWER_BYTES = 32 << 20
MAX_PAGES = 1_000
_REFUSED_CARD = 400
_NAMES_AT_ONCE = 256  # huggingface_hub, _commit_api.py: UPLOAD_BATCH_MAX_NUM_FILES
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPORT = "the server answers as no Hub does: report it to whoever runs it"


def commit_of(repository: str, revision: str) -> str:
    """Return the commit that a revision ("" is the main branch) stands for now.

    Raises what the client raises, and CheckpointError for an answer that is none.
    """
    url = f"{constants.ENDPOINT}/api/models/{repository}"
    answer, _ = _get(f"{url}/revision/{quote(revision, safe='')}" if revision else url)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _odd(repository, f"the commit is {commit!r:.80}")
    return commit


def files_of(repository: str, commit: str) -> dict[str, ListedFile]:
    """Return every file of a repository at a commit, as it is listed.

    Raises what the client raises, and CheckpointError for a listing that does not end.
    """
    found: dict[str, ListedFile] = {}
    url = f"{constants.ENDPOINT}/api/models/{repository}/tree/{commit}?recursive=true&expand=false"
    for entry in _entries(repository, url):
        if not isinstance(entry, dict):
            raise _odd(repository, f"a file is listed as {entry!r:.80}")
        if entry.get("type") != "file":
            continue
        name, size, digest = entry.get("path"), entry.get("size"), _digest(entry)
        if not isinstance(name, str) or type(size) is not int or size < 0 or not digest:
            raise _odd(repository, f"a file is listed as {entry!r:.80}")
        if name in found:
            raise _odd(repository, f"{name!r:.80} is listed twice")
        found[name] = ListedFile(size, digest)
    return found


def refusals_of(card: str) -> list[str]:
    """Return why the Hub would refuse a model card, in its own words; nothing where it takes it.

    Raises what the client raises.
    """
    url = f"{constants.ENDPOINT}/api/validate-yaml"
    with _posted(url, {"content": card, "repoType": "model"}) as response:
        if response.status_code != _REFUSED_CARD:
            hf_raise_for_status(response)
            return []
        answer = _json_of(url, response)
    errors = answer.get("errors") if isinstance(answer, dict) else None
    messages = [
        without_secrets(str(each["message"]))
        for each in (errors if isinstance(errors, list) else ())
        if isinstance(each, dict) and "message" in each
    ]
    return messages or ["it does not say why"]


def ignored_names(repository: str, revision: str, names: Sequence[str]) -> list[str]:
    """Return the names that the `.gitignore` of a repository keeps out of commits.

    Raises what the client raises.
    """
    revision = quote(revision or "main", safe="")
    url = f"{constants.ENDPOINT}/api/models/{repository}/preupload/{revision}"
    found = []
    for start in range(0, len(names), _NAMES_AT_ONCE):
        asked = [{"path": name, "sample": "", "size": 1} for name in names[start:][:_NAMES_AT_ONCE]]
        with _posted(url, {"files": asked}) as response:
            hf_raise_for_status(response)
            answer = _json_of(url, response)
        files = answer.get("files") if isinstance(answer, dict) else None
        if not isinstance(files, list):
            raise _odd(repository, f"how it takes files is {answer!r:.80}")
        found += [
            str(each.get("path"))
            for each in files
            if isinstance(each, dict) and each.get("shouldIgnore")
        ]
    return found


def _posted(url: str, asked: Any) -> AbstractContextManager["httpx.Response"]:
    """Send a question as JSON; the answer is still to be read."""
    headers = build_hf_headers(library_name="lingconv", library_version=__version__)
    sent: AbstractContextManager[httpx.Response] = watched_session().stream(
        "POST", url, headers=headers, json=asked, timeout=TIMEOUT, follow_redirects=True
    )
    return sent


def _digest(entry: dict[str, Any]) -> str:
    """Return the SHA-256 of a large file, the git hash of any other; empty where there is none."""
    large = entry.get("lfs")
    digest = large.get("oid") if isinstance(large, dict) else entry.get("oid")
    return digest if isinstance(digest, str) else ""


def _entries(repository: str, url: str) -> Iterator[Any]:
    """Yield the entries of all pages."""
    for _ in range(MAX_PAGES):
        page, following = _get(url)
        if not isinstance(page, list):
            raise _odd(repository, f"its list of files is {page!r:.80}")
        yield from page
        if not following:
            return
        if urlsplit(following)[:2] != urlsplit(constants.ENDPOINT)[:2]:
            raise _odd(repository, "the next page is on another host")  # which gets no token
        url = following
    raise _odd(repository, f"its list of files has more than {MAX_PAGES:,} pages")


def _get(url: str) -> tuple[Any, str]:
    """Return a JSON answer, and where the next page is."""
    headers = build_hf_headers(library_name="lingconv", library_version=__version__)
    with watched_session().stream(
        "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        return _json_of(url, response), response.links.get("next", {}).get("url", "")


def _json_of(url: str, response: "httpx.Response") -> Any:
    """Return what an answer holds, read up to a bound."""
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise CheckpointError(
                f"{url}: the answer has more than {MAX_ANSWER_BYTES:,} bytes", hint=_REPORT
            )
    try:
        return json.loads(body)
    except RecursionError as exc:
        raise CheckpointError(f"{url}: the answer is nested too deep", hint=_REPORT) from exc


def _odd(repository: str, what: str) -> CheckpointError:
    return CheckpointError(f"hf://{repository}: {what}", hint=_REPORT)
