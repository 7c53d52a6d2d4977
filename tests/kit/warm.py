"""Makes numba ready: imported by the process that the children are forked from.

Its tables take most of a second to build, for the first kernel that is loaded; after that, a child
loads from numba's cache what it calls, in some milliseconds each.
"""

from lingconv.encodings.kernels import jit, numeric

for _kernel, _types in jit.kernels():
    if _kernel.py_func.__module__ == numeric.__name__:
        _kernel.compile(_types)
