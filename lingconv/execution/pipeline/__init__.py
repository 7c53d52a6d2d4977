"""The stages of a strip: prefetch, decode, encode, write-behind; run by a pool of threads."""
