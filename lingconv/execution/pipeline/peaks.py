"""The largest magnitude of matrices, for encodings that need it before the first row."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from lingconv.plans.plan import Term, Transfer


class Peaks:
    """Largest magnitudes of matrices together with their peers, each found once; for all threads.

    A matrix is read once more for it. Its peers are read by the thread that asks first, and the
    others wait.
    """

    def __init__(self) -> None:
        self._found: dict[frozenset[tuple[Term, ...]], Future[float]] = {}
        self._lock = threading.Lock()

    def of(self, transfer: Transfer, find: Callable[[Transfer], float]) -> float:
        """Return the largest magnitude of the sources of a matrix and of its peers.

        `find` reads the sources of one transfer.
        """
        key = frozenset((transfer.terms, *transfer.peers))
        with self._lock:
            found = self._found.get(key)
            is_first = found is None
            if found is None:
                found = self._found[key] = Future()
        if is_first:
            try:
                found.set_result(max(find(transfer._replace(terms=terms)) for terms in key))
            except BaseException as exc:
                found.set_exception(exc)
                raise
        return found.result()
