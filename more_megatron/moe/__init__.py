"""Mixture-of-experts layers and routers that Megatron's are the base of."""
