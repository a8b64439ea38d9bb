"""What a step does in Python, done again after a replay.

- ``containers.py``: ContainersSnapshot: containers and objects as they were, compared and put back.
- ``effect.py``: Effect and its kinds: one side effect of a captured step, and how to do it again.
- ``logged_values.py``: what effects need to know of ``self.log``; ``trainer/`` implements it.
- ``module_effects.py``: everything that the steps of one module leave behind beside their output.
- ``recorder.py``: EffectRecorder: the order in which captures of a step are recorded.
- ``recording.py``: StepRecording: one captured step, and the effects that follow from it.
- ``step_state.py``: StepState: everything that a step may change, and how to put it back.
"""
