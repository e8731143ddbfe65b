"""What is measured of a run or a model."""
