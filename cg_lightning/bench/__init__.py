"""The benchmark: ``cg-lightning task=bench``.

- ``cases.py``: the networks to measure, each with its batch.
- ``charts.py``: the charts, drawn from the records.
- ``contestants.py``: the contestants: ways to run the same evaluation.
- ``costs.py``: the costs of graphs: time on the host, memory, and captures.
- ``measure.py``: measures the time of a batch; contestants take turns, all in one process.
- ``records.py``: the records as lines of JSON, and the limit that follows from them.
- ``report.py``: puts the figures of an earlier run into README and docs.
- ``run.py``: measures every contestant on every case.
- ``shapes.py``: batches of text whose lengths vary; a program of its own.
- ``tables.py``: the tables of a run, and those in README and docs.
- ``training.py``: the contestants of training, and how far weights are from eager's.
- ``zoo.py``: runs models of other libraries with and without graphs, and compares all outputs.
- ``zoo_models.py``: these models, with random weights, and their batches.
"""
