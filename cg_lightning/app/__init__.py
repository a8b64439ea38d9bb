"""The command ``cg-lightning``.

- ``bench.py``: the benchmark, from a config.
- ``compare.py``: compares the numbers of two runs.
- ``config.py``: schemas for Hydra, and the folder of the YAML files.
- ``demo.py``: small models and real data, for the default run, the notebooks and the tests.
- ``main.py``: the command ``cg-lightning``.
- ``run.py``: one run of a task.
"""
