"""Who runs a step, and how that is decided.

- ``changing_values.py``: notices values that are another one in each batch, such as names of
  files: no graph of the whole step would be replayed.
- ``dispatcher.py``: who decides in which mode a step runs.
- ``graphed_call.py``: a call that runs through a graph wrapper: inputs are copied into static
  ones, outputs are copied out.
- ``session.py``: what is known of one module while a Trainer runs it: decisions, graphs and
  counts.
- ``step_runner.py``: runs each step of one stage in the mode that its batch allows.
- ``submodule_runner.py``: a submodule whose calls run from graphs where the step is in mode
  PIECEWISE.
- ``targets.py``: which submodules the user named.
- ``verifier.py``: compares the first replays of a graph with eager, on the user's own batches.
"""
