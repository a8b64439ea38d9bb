"""A graph of ours: inputs, outputs, budget, and the wrapper.

- ``cache.py``: how many graphs there may be; the least recently used goes first.
- ``monitor.py``: a gate that forbids captures, and a count of those that happened (vLLM:
  ``compilation/monitor.py``, ``counter.py``).
- ``outputs.py``: how an output is put together after each replay.
- ``static_inputs.py``: input tensors at fixed addresses, which the graphs of one key read.
- ``weak_ref.py``: tensors that do not keep their memory.
- ``wrapper.py``: the wrapper that captures and replays what it wraps.
"""
