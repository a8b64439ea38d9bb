"""Side effects of a step in Python, and how to do them again after a replay.

- ``attributes.py``: AttributesSnapshot: the attributes of modules, restored.
- ``batch_entries.py``: entries that a step adds to its batch, replaces or removes.
- ``batch_writes.py``: tensors of its batch that a step writes to; a replay copies them back.
- ``containers.py``: ContainersSnapshot: containers and objects, compared and restored.
- ``effect.py``: Effect: one side effect of a captured step, and what uses values of a graph.
- ``host_draws.py``: unused random numbers of the host, drawn again with each replay.
- ``kinds.py``: the kinds of effects: of metrics, and of ``self.log``.
- ``late_reads.py``: values that a step reads from a tensor and only passes on.
- ``late_updates.py``: updates of metrics that no graph can hold: they run eagerly after each
  replay.
- ``logged_numbers.py``: ``self.log`` of Python numbers: a graph makes the tensor on the device.
- ``logged_values.py``: the interface to ``self.log``, which ``trainer/`` implements.
- ``module_effects.py``: all side effects of the steps of one module.
- ``places.py``: attributes that a step changes, and the places inside them.
- ``python_changes.py``: values that a step appends, adds or sets in Python, done again.
- ``recorder.py``: EffectRecorder: the order in which captures of a step are recorded.
- ``recording.py``: StepRecording: one captured step, and its effects.
- ``side_effects.py``: what a watched step does besides computing, for captures and replays.
- ``step_state.py``: StepState: everything that a step may change; it can be restored.
"""
