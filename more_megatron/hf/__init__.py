"""MoRE models in the Hugging Face format."""
