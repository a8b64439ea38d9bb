"""Captures and their graphs: inputs, outputs, budget, and the wrapper.

- ``answered_copies.py``: answers copies from the host in a captured call.
- ``answered_reads.py``: answers reads on the host in a captured step.
- ``attempt.py``: one attempt to capture a call, in which everything else is answered or recorded.
- ``cache.py``: all graphs of one session: the budget, and which graph is dropped first.
- ``call.py``: what is captured: a call of a step or of a submodule.
- ``capture.py``: captures a call, with remedies if that fails.
- ``entry.py``: a captured graph with everything that its replay needs: the fast path.
- ``graph.py``: one capture: the switch, the counter, and weak references to outputs.
- ``host_constants.py``: constants that a call makes of Python values, at fixed addresses.
- ``host_copies.py``: copies to the host in a captured step: each replay makes them after the graph.
- ``lent_gradients.py``: gradients that a graph gives out as they are.
- ``outputs.py``: where each part of an output comes from.
- ``passed_on.py``: values of a batch that a step only passes on.
- ``static_inputs.py``: input tensors at fixed addresses.
- ``wrapper.py``: the public, vLLM-shaped wrapper that captures and replays a callable.
"""
