"""The model in transformers: modules that are copied into exports and import torch and transformers alone."""
