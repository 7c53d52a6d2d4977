"""The Hugging Face Hub: how repositories are named, talked to, filled and described."""
