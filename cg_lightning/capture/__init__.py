"""A graph of ours: inputs, outputs, budget, and the wrapper.

- ``cache.py``: all graphs of one session: how many there may be, and which goes first.
- ``capture.py``: captures one call of a step or of a submodule.
- ``entry.py``: a captured graph with all that a replay needs: the fast path.
- ``graph.py``: one capture: the gate, the counter, outputs that do not keep their memory.
- ``outputs.py``: how an output is put together after each replay.
- ``static_inputs.py``: input tensors at fixed addresses, which the graphs of one key read.
- ``wrapper.py``: the public, vLLM-shaped wrapper that captures and replays what it wraps.
"""
