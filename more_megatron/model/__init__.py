"""Stack side: depth, state noise, truncation, and the decoder that repeats groups of layers."""
