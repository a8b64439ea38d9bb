"""torchmetrics: states at fixed addresses, and functions that do not wait for the device.

- ``deferred_checks.py``: checks of values that a graph computes on the device, and that are read
  later.
- ``members.py``: the metrics of a module, and which of their attributes a replay can bring up to
  date.
- ``states.py``: metric states at fixed addresses, which graphs read and write.
- ``support.py``: what a step may do to a metric so that a replay can bring it up to date.
- ``sync_free.py``: functions of torchmetrics that wait for the device, and equal ones that do
  not: used in captures only.
"""
