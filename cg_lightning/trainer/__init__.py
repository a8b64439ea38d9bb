"""The adapter to Lightning: nothing below this folder imports it.

- ``batch_transfer.py``: copies batches to the device while it computes.
- ``closure_hooks.py``: the user's code that runs between a step and its backward.
- ``ddp.py``: runs the steps of closures in the forward of DDP, which reduces their gradients.
- ``ddp_buckets.py``: reduces gradients in the buckets of DDP, without a backward.
- ``examples.py``: batches of a run that are captured ahead.
- ``given_batches.py``: batches that the user gives to ``CUDAGraphCallback.capture``.
- ``gradient_copies.py``: copies gradients of a graph, into the memory of earlier copies if it is
  free.
- ``installation.py``: intercepts the steps of a stage at the strategy, and restores them.
- ``log_calls.py``: repeats ``self.log`` after a replay, for a Lightning version that stores logged
  values in an unknown way.
- ``logged_results.py``: adapter for Lightning's private results collection, which stores values
  passed to ``self.log``.
- ``loggers.py``: sends numbers to the loggers of a Trainer.
- ``node_hooks.py``: hooks that the user adds to nodes of autograd between two closures.
- ``parts.py``: what evaluation and training install alike: a session, and transfers of batches.
- ``preconditions.py``: conditions that are checked before the first batch.
- ``prediction_copies.py``: copies predictions to the host while the device computes the next ones.
- ``progress.py``: a bar for captures ahead, of the same kind as the bar of the Trainer.
- ``redirection.py``: replaces the module's step in the forward of DDP.
- ``stage_length.py``: the dataloaders of a stage, and the number of batches that run of each.
- ``training.py``: intercepts the closures of training, and restores them.
- ``training_step.py``: the part of a closure that a graph holds, and the part that follows it.
"""
