"""Loops over numpy buffers that release the GIL: no files, no names, no logging."""
