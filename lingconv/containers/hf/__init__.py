"""Hugging Face checkpoints: safetensors shards, an index, config.json."""
