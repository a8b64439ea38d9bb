"""What a step does in Python, done again after a replay.

- ``attributes.py``: the attributes of objects, to put them back.
- ``effect.py``: what a captured step does to metrics, and how a replay does it again.
- ``host_randomness.py``: the random generators of the host, which a graph cannot follow.
- ``recorder.py``: records what a captured step does to metrics.
- ``step_metrics.py``: the metrics of one module while a Trainer runs it.
"""
