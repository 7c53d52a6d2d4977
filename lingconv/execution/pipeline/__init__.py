"""The stages that a strip passes: prefetch, decode, encode, write behind; by a pool of threads."""
