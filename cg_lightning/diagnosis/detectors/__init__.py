"""One detector a file. ``watcher.py`` has the order.

- ``attribute_reads.py``: attributes of modules that a step reads: a graph freezes their values.
- ``backward.py``: the backward of a training step, and the gradients that the step reads.
- ``batch_attributes.py``: attributes of containers of the batch that are no items.
- ``batch_index.py``: whether a step does anything with the number of its batch, other than
  comparing it.
- ``compiled.py``: modules that ``torch.compile`` runs: they are watched from outside.
- ``copied_constants.py``: constants of the host that a step copies to the device: indices, and
  tensors of the CPU.
- ``device_events.py``: events of the device that a step records and that live longer: no replay
  records them.
- ``global_reads.py``: globals that a step reads, and the state of its functions: a graph freezes
  both.
- ``hooks.py``: forward hooks: arbitrary code around the call of a module.
- ``host_constants.py``: tensors that a step makes of Python values: a graph clones what was made
  before its capture.
- ``host_copies.py``: copies to the host that a step does not read: a replay makes them after the
  graph.
- ``host_reads.py``: calls that wait for the device, and that the dispatcher does not show.
- ``host_values.py``: reads on the host whose values are known before the step.
- ``late_updates.py``: updates of metrics that may follow the step, because the step does not use
  their results.
- ``logging.py``: ``self.log`` and ``self.log_dict``.
- ``metric_updates.py``: updates of metrics that a graph cannot contain, or a replay cannot repeat.
- ``mode_dependent.py``: operations that PyTorch computes in another way while a dispatch mode is
  on.
- ``moved_tensors.py``: parameters and buffers that a step gives other memory.
- ``mutations.py``: tensors that a step changes in place: its inputs, and tensors that exist
  longer.
- ``operations.py``: dispatched operations that a graph cannot contain, and gradients.
- ``printing.py``: ``print``, ``self.print``, standard output, the user's loggers and the Trainer's.
- ``random_numbers.py``: random numbers drawn on the host, which a graph cannot follow.
- ``rebound_state.py``: state that a step keeps in Python: attributes that it sets, containers that
  it fills.
- ``tensor_attributes.py``: attributes of parameters, buffers and inputs that a step reads:
  ``.grad``, ``weight.scale``.
- ``trainer_reads.py``: values of the Trainer that a step reads: a graph would freeze them.
- ``undone_reads.py``: globals that a run of compiled code changes, restored afterwards.
- ``world.py``: files, processes and sockets that a step uses: a graph would use them once, when it
  is captured.
"""
