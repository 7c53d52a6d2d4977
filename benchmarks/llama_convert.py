"""llama.cpp's converter, for checkpoints whose tokenizer it does not know by heart.

    python benchmarks/llama_convert.py LLAMA_CPP SRC DST

It recognises tokenizers by a hash of what they make of a text; one of a synthetic checkpoint it
refuses. All that is changed here is that it takes any tokenizer for Ling's.
"""

import sys
from importlib import import_module


def main() -> None:
    """Convert SRC to a BF16 GGUF file at DST with the converter in the checkout LLAMA_CPP."""
    checkout, source, target = sys.argv[1:]
    sys.path[:0] = [checkout, f"{checkout}/gguf-py"]
    base = import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "bailingmoe2"
    sys.argv = ["convert_hf_to_gguf", "--outtype", "bf16", "--outfile", target, source]
    import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
