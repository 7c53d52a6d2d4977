"""GGUF, the format of llama.cpp: header, key-values, tokenizer; one file or a split."""
