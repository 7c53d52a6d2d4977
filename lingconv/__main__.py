"""Runs the command line with `python -m lingconv`."""

from lingconv.cli import main

main()
