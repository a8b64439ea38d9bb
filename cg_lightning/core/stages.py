"""The stages and their step methods."""

STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
"""The step method of each stage."""
