"""Watching one eager step for what a graph could not hold, or would freeze.

- ``accumulators.py``: whether a method of a plain object only accumulates, from its source.
- ``attribute_events.py``: what a step does to attributes, and what a replay can do again.
- ``call_events.py``: every call of a function in the watched step, as Python tells of it.
- ``callers.py``: what the functions that are running do with a call that they have made.
- ``conditions.py``: under which comparisons of an argument a line runs, read from its source.
- ``definitions.py``: the source of a function as a tree, if it is the source of the code that runs.
- ``detector.py``: what all detectors have in common.
- ``findings.py``: findings, and where in the user's code something happened.
- ``functions.py``: the function objects behind the frames of the calls that are told.
- ``hidden_modules.py``: modules that are no submodules, and what they hold.
- ``library_settings.py``: settings that functions of PyTorch read in Python.
- ``module_state.py``: what a module holds, to be compared later.
- ``late_unit.py``: what a watched step showed of one unit of metrics: whether its updates may
  follow the step.
- ``names_in_code.py``: what the instructions of a function name: globals, imports, computed names.
- ``operands.py``: the tensors that a dispatched operation takes, makes and writes to.
- ``profilers.py``: other profilers of the thread, which pause before Python 3.12.
- ``report.py``: what stands in the way of graphs, as an object and as a table.
- ``step_watch.py``: the step that is watched: the stack of calls under way, and what detectors
  report.
- ``uses_of_argument.py``: where a step uses one of its arguments, read from byte code and source.
- ``uses_of_attribute.py``: what a line does with an attribute that it reads, from its source.
- ``volatile_functions.py``: functions whose result no guard can compare: clocks, counts of memory.
- ``watched_step.py``: what one watched step showed, by call of a submodule.
- ``way.py``: the way of a step through the code: every instruction of Python that ran.
- ``watcher.py``: watches one eager step under all detectors, without changing what it computes.
- ``writes.py``: functions by which a step says something, and that nobody replaces.
"""
