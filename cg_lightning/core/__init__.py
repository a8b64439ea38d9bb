"""Modes, keys, context, wrapper, dispatcher: knows neither Lightning nor Hydra."""
