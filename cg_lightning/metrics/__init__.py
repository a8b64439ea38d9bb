"""torchmetrics: states at fixed addresses, and functions that do not wait for the device.

- ``deferred_checks.py``: checks of values that a graph computes on the device, and that are read
  later.
- ``members.py``: the metrics of a module, and which of their attributes a replay can bring up to
  date.
- ``states.py``: metric states at fixed addresses, which graphs read and write.
- ``support.py``: what a replay can bring up to date of what a step does to a metric, and what not.
- ``sync_free.py``: functions of torchmetrics that wait for the device, and equal ones that do
  not: used in captures only.
"""
