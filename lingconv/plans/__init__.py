"""The plan as a value: output files, transfers, options; with a digest and a JSON form, no I/O."""
