"""What `megatron.training.pretrain` is handed: arguments, model, datasets, batch and loss."""
