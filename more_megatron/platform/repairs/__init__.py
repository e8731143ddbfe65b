"""Repairs of the `megatron-core` wheel, in place on every platform; `table` has all of them."""
