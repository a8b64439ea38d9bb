"""The benchmark: ``cg-lightning task=bench``.

- ``cases.py``: networks to measure, from ``torch.nn`` alone, each with its batch.
- ``contestants.py``: what is compared: ways to run the same evaluation.
- ``costs.py``: what graphs cost beside the time that they save.
- ``measure.py``: times evaluations, in turn and in one process.
- ``report.py``: the benchmark's figures as lines of JSON, as a table and as a chart.
- ``run.py``: measures all contestants on all cases.
"""
