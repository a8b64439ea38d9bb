"""One detector a file; each states the causes that it finds. ``watcher.py`` has the order.

- ``attribute_reads.py``: attributes of modules that a step reads: a graph freezes their values.
- ``backward.py``: the backward of a training step, and the gradients that the step reads.
- ``batch_index.py``: whether a step does anything with the number of its batch, other than
  comparing it.
- ``compiled.py``: modules that ``torch.compile`` runs: they are watched from outside.
- ``copied_constants.py``: constants of the host that a step copies to the device: indices, and
  tensors of the CPU.
- ``global_reads.py``: globals that a step reads, and what its functions hold: a graph freezes them
  all the same.
- ``hooks.py``: forward hooks: arbitrary code around the call of a module.
- ``host_constants.py``: tensors that a step makes of Python values: a graph clones what was made
  before its capture.
- ``host_reads.py``: calls that wait for the device, and that the dispatcher does not show.
- ``host_values.py``: reads on the host whose values are known before the step.
- ``late_updates.py``: updates of metrics that may follow the step, because the step uses nothing of
  them.
- ``logging.py``: ``self.log`` and ``self.log_dict``.
- ``metric_updates.py``: what a step does to metrics that a graph cannot hold, or a replay not bring
  up to date.
- ``moved_tensors.py``: parameters and buffers that a step gives other memory.
- ``mutations.py``: what a step changes in place: what it was given, and tensors that live longer
  than it.
- ``operations.py``: dispatched operations that a graph cannot hold, and gradients.
- ``printing.py``: ``print``, ``self.print``, standard output, the user's loggers and the Trainer's.
- ``random_numbers.py``: random numbers drawn on the host, which a graph cannot follow.
- ``rebound_state.py``: state that a step keeps in Python: attributes that it sets, containers that
  it fills.
- ``tensor_attributes.py``: what a step reads of parameters and buffers beside their values:
  ``.grad``, ``weight.scale``.
- ``trainer_reads.py``: what a step reads from the Trainer: a graph would freeze it.
- ``world.py``: files, processes and sockets that a step uses: a graph would use them once, when it
  is captured.
"""
