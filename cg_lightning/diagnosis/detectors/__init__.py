"""One file a detector; each names the causes that it finds.

- ``batch_index.py``: whether a step does anything with the number of its batch, rather than
  passing it on.
- ``global_reads.py``: which globals a step reads: they are in no module, and a graph freezes
  them all the same.
- ``metric_updates.py``: watches what an eager step does to metrics: what of it a graph could not
  hold, and a replay not bring up to date.
- ``rebound_state.py``: what the attributes of a module hold, before a step and after.
"""
