"""Batches padded up to sizes that are captured, and outputs cut back.

- ``entry.py``: the graph of a padded batch, as the batches of one smaller shape see it.
- ``leaves.py``: the tensors of one shape of batch, padded: which, up to where, and with what.
- ``output_cut.py``: cuts the output for a padded batch to the shapes of eager.
- ``padder.py``: decides how a batch is padded.
- ``path.py``: what a step reads on the host, for the batch and for the padded batch.
- ``rules.py``: the rules of the settings, or proposed ones; refuses what does not fit the batch.
"""
