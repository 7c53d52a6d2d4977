"""What the files look like: names, headers and offsets, never the meaning of a tensor."""
