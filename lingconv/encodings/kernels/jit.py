"""JIT compilation of kernels, and the cache of compiled ones.

numba compiles a kernel for the types of a call. The types that runs use are a kernel's
`signatures`: wheels contain their code for common CPUs (`aot.py`), so that the first command of a
fresh install, which may be read-only, does not wait for a compiler. Any other combination of types,
numba and Python is compiled on the first call, and numba caches it beside the module or in the
user's cache, if it can.

A helper is a function that kernels call; it is compiled into them.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, TypeVar, cast

import numba
from numba import types
from numba.core.compiler import CompileResult

from lingconv.encodings.kernels.aot import ShippedKernels, shipped_for_this_machine, sources_digest

Function = TypeVar("Function", bound=Callable[..., Any])
Signature = tuple[Any, ...]

# Types for signatures: contiguous arrays by dtype and number of axes, and numba's numbers.
BYTES: Final = types.uint8[:, ::1]
BF16: Final = types.uint16[:, ::1]  # its bits
F32: Final = types.float32[:, ::1]
BF16_LINE: Final = types.uint16[::1]
F32_LINE: Final = types.float32[::1]
F64_LINE: Final = types.float64[::1]
INT: Final = types.int64
FLOAT: Final = types.float64
BOOL: Final = types.boolean

# A division by zero gives an infinity, as in C: a check for it would prevent SIMD.
_OPTIONS: Final = {"nogil": True, "error_model": "numpy"}

_njit: Any = numba.njit
helper: Any = _njit(**_OPTIONS)
inlined: Any = _njit(inline="always", **_OPTIONS)

_kernels: list[tuple[Any, tuple[Signature, ...]]] = []


class _Shelf:
    """A function's cache for numba: shipped kernels first, then numba's own cache."""

    def __init__(self, function: Callable[..., Any], shipped: ShippedKernels, behind: Any) -> None:
        self._function = function
        self._shipped = shipped
        self._behind = behind

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled code for the types `sig`, or None."""
        payload = self._shipped.load(self._function, sig)
        if payload is None:
            return self._behind.load_overload(sig, target_context)
        target_context.refresh()
        rebuild: Any = CompileResult._rebuild
        return rebuild(target_context, *payload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


def kernel(*signatures: Signature, **options: Any) -> Callable[[Function], Function]:
    """Return a decorator for an entry point; `signatures` are compiled ahead of time."""

    def decorate(function: Function) -> Function:
        dispatcher = _njit(**(_OPTIONS | options))(function)
        with suppress(RuntimeError):  # no folder is writable for a cache
            dispatcher.enable_caching()
            # numba checks only the kernel's own module for changes; its helpers are in others.
            dispatcher._cache._cache_file._source_stamp = sources_digest()
        shipped = shipped_for_this_machine()
        if shipped is not None:
            dispatcher._cache = _Shelf(function, shipped, dispatcher._cache)
        _kernels.append((dispatcher, signatures))
        return cast("Function", dispatcher)

    return decorate


def kernels() -> Iterator[tuple[Any, Signature]]:
    """Yield every imported kernel, once for each of its signatures."""
    for dispatcher, signatures in _kernels:
        for signature in signatures:
            yield dispatcher, signature
