"""The command ``cg-lightning``.

- ``bench.py``: the benchmark, from a config.
- ``compare.py``: whether two runs gave the same numbers.
- ``config.py``: schemas for Hydra, and where the YAML files are.
- ``demo.py``: small models and real data, for the default run, the notebooks and the tests.
- ``main.py``: the command ``cg-lightning``.
- ``run.py``: one run of a task.
"""
