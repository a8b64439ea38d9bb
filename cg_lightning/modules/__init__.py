"""``nn.Module``: facts about modules, and interception of their calls and attributes.

- ``attributes.py``: which attributes of modules a graph may have frozen, and whether they are
  still the same.
- ``compiled.py``: submodules that ``torch.compile`` runs: what is inside them runs from compiled
  code, which nobody can watch.
- ``interception.py``: intercepts calls of one module object without leaving a trace in it.
"""
