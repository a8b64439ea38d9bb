"""The command ``cg-lightning``.

- ``bench.py``: the benchmark, from a config.
- ``compare.py``: compares the numbers of two runs.
- ``config.py``: schemas for Hydra, and the folder of the YAML files.
- ``demo.py``: small models and real data, for the default run, the notebooks and the tests.
- ``diagnose.py``: ``task=diagnose``: why a step is not one graph.
- ``docstrings.py``: real text whose lengths vary.
- ``help.py``: the text of ``cg-lightning --help``.
- ``jobs.py``: results of jobs, and the one table of them with which a multirun ends.
- ``main.py``: the command ``cg-lightning``.
- ``mistakes.py``: mistakes on the command line, each as one sentence.
- ``run.py``: one run of a task.
- ``shapes.py``: ``task=shapes``: the shapes of a dataloader, and the sizes to pad to.
- ``tables.py``: tables, by rich where it is installed.
- ``timing.py``: the time of a batch in each stage of a run.
- ``zoo.py``: the zoo, from a config.
"""
