"""The stages and their step methods."""

STEP_METHODS = {
    "validate": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
    "train": "training_step",
}
"""The step method of each stage."""
TRAIN = "train"
"""The training stage. Its graphs contain the whole closure: the step and its backward."""
CALL = "call"
"""The name of the stage if there is no Trainer."""
EVALUATING = tuple(stage for stage in STEP_METHODS if stage != TRAIN)
"""The stages that compute no gradients."""
