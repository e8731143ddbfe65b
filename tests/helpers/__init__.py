"""Helpers of the tests: worlds of ranks, and training runs in them."""
