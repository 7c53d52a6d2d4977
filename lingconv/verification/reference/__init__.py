"""The reference forward pass: plain torch, streamed one layer at a time.

`ling2.py` is the mathematics, `weights.py` brings the numbers in time, `forward.py` walks through
the layers, `prompts.py` makes tokens of text.
"""
