"""Values that a step reads on the host, and that are known before it: from its batch alone.

- ``exact_operations.py``: operations that give the same bits on every device.
- ``host_copies.py``: what the host still has of a batch that was copied to the device.
- ``path.py``: the values that one path through a step reads, as a program that is run before the
  step.
- ``provenance.py``: where the tensors of a watched step come from.
- ``repeats.py``: programs without what they would compute twice.
"""
