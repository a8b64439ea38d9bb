"""The stages and their step methods."""

STEP_METHODS = {
    "validate": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
    "train": "training_step",
}
"""The step method of each stage."""
TRAIN = "train"
"""The stage whose graphs hold more than the step: the closure, with its backward."""
CALL = "call"
"""Stands for the stage where there is no Trainer."""
EVALUATING = tuple(stage for stage in STEP_METHODS if stage != TRAIN)
"""The stages that compute no gradients."""
