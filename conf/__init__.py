"""Configuration files; makes ``pkg://cg_lightning.conf`` a Hydra search path."""
