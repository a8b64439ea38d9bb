"""Words: modes, keys, context, settings, reasons. Imports torch and nothing of ours outside
  ``core``.

- ``call_key.py``: the key of one call of a submodule.
- ``causes.py``: why a step cannot run from a graph, and what its author can do about it.
- ``descriptor.py``: the key of a graph: all that must be equal for it to be replayable.
- ``equality.py``: whether two leaves of outputs are the same number.
- ``errors.py``: what can go wrong, as types. Mistakes in an argument are plain ``ValueError``.
- ``forward_context.py``: the step under way: which runtime mode it is in, and under which key.
  Wrappers read it and trust it.
- ``kernel_flags.py``: the process-wide switches that change which kernels a step launches, hence
  part of every key.
- ``modes.py``: the modes a step can run in.
- ``settings.py``: what users may give: each check names the argument, what was given, and what
  was expected.
- ``reasons.py``: why a step runs in a lower mode than asked: one record, from where it is found to
  where it is shown.
- ``stages.py``: stages and their methods.
- ``tree.py``: nested batches and outputs: leaves in order, their paths, and the same nest with
  other leaves.
"""
