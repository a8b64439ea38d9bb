"""Guards: the values that a graph has frozen, compared before each replay.

- ``audit_events.py``: one hook for the audit events of Python.
- ``changed_values.py``: kinds of values that a step changes and never reads.
- ``comparisons.py``: the comparisons of a number that a step makes, and their outcomes.
- ``frozen_parts.py``: records of frozen values, which compare them and explain changes.
- ``gradient_memory.py``: memory that code in a backward reads, and where no gradient may be.
- ``guard_set.py``: the guards of one graph: the values that its step read in Python.
- ``host_tensors.py``: tensors of the host that a step on a device reads.
- ``identity.py``: comparisons by identity, in a few native calls.
- ``layer_settings.py``: the settings of all layers and metrics of a module.
- ``library_code.py``: functions of libraries that are replaced in mid-stage.
- ``module_guard.py``: the guard of a module itself: members, their placement, hooks, settings.
- ``recorded_setters.py``: settings of kernels that are in no key.
- ``sources.py``: sources: where a value comes from that a step reads in Python.
- ``trainer_values.py``: values of the Trainer that can be guarded.
- ``values.py``: the contents of guarded values: containers, objects, arrays and tensors.
- ``value_kinds.py``: kinds of values: harmless, compared, or opaque.
- ``written_settings.py``: settings of submodules that are set during a stage.
"""
