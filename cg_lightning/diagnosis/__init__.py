"""The watched step: one eager step under detectors, which find everything that prevents a graph.

- ``accumulators.py``: whether a method of a plain object only accumulates, from its source.
- ``attribute_events.py``: reads and writes of attributes in a step, and changes to repeat.
- ``call_events.py``: every call of a function in the watched step, as Python reports it.
- ``callers.py``: how the functions that run use the result of a call.
- ``compared_expressions.py``: what the source of a step only compares, and with what.
- ``conditions.py``: under which comparisons of an argument a line runs, read from its source.
- ``contents.py``: the contents of values that a step reads or changes.
- ``definitions.py``: the source of a function as a tree, if it is the source of the code that runs.
- ``detector.py``: the base class of all detectors.
- ``findings.py``: findings, and where in the user's code something happened.
- ``frames.py``: facts about the frame of a call: whose code runs, and with which arguments.
- ``functions.py``: the function objects of frames.
- ``garbage.py``: no old garbage is collected while a step is watched.
- ``hidden_modules.py``: modules that are no submodules, and their attributes.
- ``library_settings.py``: settings that functions of PyTorch read in Python.
- ``log_levels.py``: levels of loggers that a step asks for.
- ``module_state.py``: a snapshot of the attributes of a module, which is compared later.
- ``late_unit.py``: one unit of metrics in a watched step: whether its updates may follow the step.
- ``lines_of_changes.py``: the line of a step that changes an object, a global or a closure.
- ``monitoring.py``: a tool of ``sys.monitoring``, which reports what runs, from Python 3.12 on.
- ``names_in_code.py``: what the instructions of a function name: globals, imports, computed names.
- ``operands.py``: the tensors that a dispatched operation takes, makes and writes to.
- ``operation_log.py``: digests of operations, and where two runs of a step first differ.
- ``operation_mode.py``: reports to detectors each operation that PyTorch dispatches.
- ``report.py``: all findings, as an object and as a table.
- ``sources_of_code.py``: what some code may read: globals that it names, and what is inside.
- ``step_run.py``: how a watched step runs, and which observers receive what it does.
- ``step_watch.py``: the step that is watched: the stack of calls under way, and what detectors
  report.
- ``uses_of_argument.py``: where a step uses one of its arguments, read from byte code and source.
- ``uses_of_attribute.py``: how a line uses an attribute that it reads, from its source.
- ``uses_of_read.py``: what a step does with a value that it reads from a tensor.
- ``volatile_functions.py``: functions whose result no guard can compare: clocks, counts of memory.
- ``watched_step.py``: the results of one watched step, by call of a submodule.
- ``way.py``: the way of a step through the code: every instruction of Python that ran.
- ``watcher.py``: watches one eager step under all detectors, without changing what it computes.
- ``writes.py``: functions that write or show text, and are not replaced.
"""
