"""The reference forward pass: plain torch, streamed one layer at a time.

`ling2.py` has the formulas, `weights.py` prefetches weights, `forward.py` runs the layers in order,
`prompts.py` tokenizes text.
"""
