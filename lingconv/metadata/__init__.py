"""What a GGUF file says about its model besides weights: numbers, tokenizer, provenance.

`describe.py` writes all of it, `rebuild.py` makes the small files of Hugging Face from it again.
"""
