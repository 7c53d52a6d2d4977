"""File formats: one folder for each, with reading, recognising, writing and closing files inside.

`base.CheckpointFormat` is what a format has to answer, `registry` finds them.
Imports plans and everything below.
"""
