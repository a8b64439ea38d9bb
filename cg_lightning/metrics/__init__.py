"""torchmetrics: states at fixed addresses, and functions that do not wait for the device.

- ``argument_checks.py``: replacements for functions of PyTorch that check their arguments on the
  host.
- ``caught_errors.py``: whether the code that runs now would catch an error.
- ``deferred_checks.py``: checks that a graph makes on the device and that are read later.
- ``fixed_shapes.py``: replacements for functions of torchmetrics that leave values out.
- ``members.py``: the metrics of a module, their states and their bookkeeping.
- ``states.py``: metric states at fixed addresses, which graphs read and write.
- ``support.py``: the changes of a metric that a replay can reproduce.
- ``sync_free.py``: replacements for functions that wait for the device.
- ``units.py``: metrics that are updated together, and their calls from outside.
"""
