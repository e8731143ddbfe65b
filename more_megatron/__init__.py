"""MoRE: pretraining of mixtures of recurrent experts on Megatron."""

__version__ = "0.1.0"
