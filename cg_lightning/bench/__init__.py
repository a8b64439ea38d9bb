"""The benchmark: ``cg-lightning task=bench``."""
