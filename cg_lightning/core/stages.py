"""Stages and their methods."""

STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
"""The step method of each stage."""
