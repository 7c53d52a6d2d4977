"""What a model is: a family file's tensors, symbols and layouts, without any checkpoint."""
