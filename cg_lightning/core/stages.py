"""The stages and their step methods."""

STEP_METHODS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
"""The step method of each stage."""
