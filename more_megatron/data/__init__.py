"""Text to Megatron's indexed datasets: reading, encoding, writing, checking."""
