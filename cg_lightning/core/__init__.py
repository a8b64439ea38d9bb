"""Basic types: modes, keys, context, settings, reasons.

It imports torch, and nothing of this package outside ``core``.

- ``causes.py``: causes: why a step cannot run from a graph, with a remedy for each.
- ``closure.py``: inputs and outputs of the closure of a training step.
- ``descriptor.py``: the key of a graph: everything that must be equal for it to be replayable.
- ``equality.py``: bitwise comparison of two leaves of an output, and copies to compare.
- ``errors.py``: errors of this package. A wrong argument raises a plain ``ValueError``.
- ``forward_context.py``: the current step: its runtime mode and its key. Wrappers read it and
  trust it.
- ``kernel_flags.py``: switches of the process that select kernels. They are part of every key.
- ``lines.py``: lines of the user's as users read them, also in a notebook.
- ``modes.py``: the modes a step can run in.
- ``pad_rules.py``: the syntax of sizes of padded batches, and its checks.
- ``settings.py``: all options, with their checks.
- ``reasons.py``: why a step runs in a lower mode than asked, as a record.
- ``shape_proposal.py``: which sizes batches should be padded to, from the shapes that were seen.
- ``stages.py``: the stages and their step methods.
- ``tree.py``: nested batches and outputs: flatten, name and rebuild them.
"""
