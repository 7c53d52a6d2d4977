"""Models: the tensors, symbols and layouts of a family file, independent of any checkpoint."""
