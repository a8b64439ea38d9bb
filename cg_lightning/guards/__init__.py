"""What a graph has frozen, compared before each replay.

- ``changed_values.py``: the kinds of values that a step changes and never looks at.
- ``comparisons.py``: how a step compares a number, and what comes out of it.
- ``frozen_parts.py``: records of frozen values, which compare them and explain changes.
- ``guard_set.py``: what one graph has frozen of what its step read in Python.
- ``host_tensors.py``: tensors of the host that a step on a device reads.
- ``identity.py``: comparisons by identity, in a few native calls.
- ``module_guard.py``: what a graph has frozen of a module itself: members, their
  placement, hooks, settings.
- ``sources.py``: where a value comes from that a step reads in Python.
- ``trainer_values.py``: what a step may read of the Trainer and still be one graph.
- ``values.py``: what is inside frozen values: containers, objects, arrays and tensors.
- ``value_kinds.py``: what a value is to a graph: harmless, compared, or opaque.
- ``written_settings.py``: settings of submodules that somebody sets during a stage.
"""
