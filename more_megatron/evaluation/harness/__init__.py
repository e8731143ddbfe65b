"""lm-evaluation-harness as a library: our models and tasks for it, and what is made of its results."""
