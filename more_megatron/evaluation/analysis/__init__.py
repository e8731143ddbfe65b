"""What goes on inside a model: one question a file."""
