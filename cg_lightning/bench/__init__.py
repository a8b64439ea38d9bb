"""The benchmark: ``cg-lightning task=bench``.

- ``cases.py``: the networks to measure, each with its batch.
- ``contestants.py``: the contestants: ways to run the same evaluation.
- ``costs.py``: what graphs cost: time on the host, memory, and captures.
- ``measure.py``: measures the time of a batch; contestants take turns, all in one process.
- ``report.py``: the records of the benchmark as lines of JSON, as a table and as charts.
- ``run.py``: measures every contestant on every case.
- ``zoo.py``: runs models of other libraries with and without graphs, and compares all outputs.
- ``zoo_models.py``: these models, with random weights, and their batches.
"""
