"""The files that are written last and make a checkpoint complete: index, config, record, card."""
