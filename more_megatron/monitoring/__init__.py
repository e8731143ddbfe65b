"""What is watched while a model trains."""

# In the `--save` folder: a line of JSON for each step that was watched.
HEALTH_FILE = "health.jsonl"
