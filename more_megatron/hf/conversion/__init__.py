"""Checkpoints between Megatron's torch_dist format and Hugging Face folders, without a GPU and without ranks."""
