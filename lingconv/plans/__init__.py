"""The plan as a value: output files, transfers, options; pure, with a digest and a JSON form."""
