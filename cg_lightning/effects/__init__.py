"""What a step does in Python, done again after a replay.

- ``effect.py``: Effect and its kinds: one side effect of a captured step, and how to do it again.
- ``logged_values.py``: what effects need to know of ``self.log``; ``trainer/`` implements it.
- ``module_effects.py``: everything that the steps of one module leave behind beside their output.
- ``recorder.py``: EffectRecorder: finds the effects of a step while it is captured.
- ``step_state.py``: StepState: everything that a step may change, and how to put it back.
"""
