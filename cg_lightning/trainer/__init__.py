"""Everything that knows Lightning.

- ``batch_transfer.py``: copies batches to the device beside the computation.
- ``installation.py``: intercepts the steps of a stage at the strategy, and restores them.
- ``log_calls.py``: repeats ``self.log`` after a replay, for a Lightning version that stores logged
  values in an unknown way.
- ``logged_results.py``: adapter for Lightning's private results collection, which stores values
  passed to ``self.log``.
- ``preconditions.py``: conditions that are checked before the first batch.
"""
