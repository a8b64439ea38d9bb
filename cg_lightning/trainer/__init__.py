"""Everything that knows Lightning.

- ``installation.py``: takes over the steps of a stage at the strategy, and gives them back.
- ``log_calls.py``: ``self.log`` called after a replay: for a Lightning that keeps logged values
  in a way that we do not know.
- ``logged_results.py``: the one place that knows the collection in which Lightning keeps what
  ``self.log`` was given.
- ``preconditions.py``: what has to hold before the first batch.
"""
