"""Sends finished files to the Hub or an object store while others are still written."""
