"""Who runs a step, and how that is decided.

- ``changing_values.py``: values that are another one in each batch, such as names of files.
- ``dispatcher.py``: the one place that decides in which mode a step or a call runs.
- ``outcome.py``: what a step or a call gave, and in which mode it ran.
- ``profiling.py``: ranges that profilers and traces show.
- ``session.py``: one module in one run: builds the parts, starts and stops them.
- ``step_runner.py``: stands in for one step method of a module.
- ``submodule_runner.py``: stands in for the calls of one submodule, in steps that run PIECEWISE.
- ``target.py``: a step, or a submodule, whose calls may run from graphs.
- ``targets.py``: which submodules the user named.
- ``verifier.py``: compares replays with eager, on the user's own batches.
"""
