"""Megatron-LM checkpoints: torch_dist (DCP) and legacy per-rank files (mp_rank_*)."""
