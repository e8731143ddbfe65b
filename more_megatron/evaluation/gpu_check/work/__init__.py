"""What the cases of the check do. Imports Megatron: for processes that have set their platform up."""
