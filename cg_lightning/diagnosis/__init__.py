"""Watching one eager step for what a graph could not hold.

- ``location.py``: where in the user's own code something happened.
- ``report.py``: what stands in the way of graphs, as an object and as a table.
- ``step_watch.py``: sees what a running step does that a graph could not hold.
- ``watched_step.py``: what one watched step showed: its calls of submodules, and what in them a
  graph could not hold or would freeze.
- ``watcher.py``: watches one eager step, without changing what it computes.
- ``written_tensors.py``: tensors, other than buffers, that a step changes in place: a running
  total, say. Verification puts them back.
"""
