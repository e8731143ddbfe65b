"""Stand-ins for CUDA, in place on a CPU only: what Megatron asks of a GPU, and its kernels and collectives."""
