"""What a graph has frozen, compared before each replay.

- ``module_guard.py``: notices when the tensors that graphs read have moved or were replaced.
- ``sources.py``: where a value comes from that a step reads in Python.
- ``values.py``: what attributes hold that a graph has frozen, however deep, and whether they
  still hold it.
"""
