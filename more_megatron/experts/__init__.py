"""Experts, one file for each kind. All local experts of a layer are computed together."""
