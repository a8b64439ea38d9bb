"""``nn.Module``: facts about modules, and interception of their calls and attributes.

- ``attributes.py``: which attributes of modules a graph may have frozen, and whether they are
  still the same.
- ``compiled.py``: submodules that ``torch.compile`` runs: what is inside them runs from compiled
  code, which nobody can watch.
- ``interception.py``: intercepts what happens at one module object, without a trace in the object
  or its class.
- ``kinds.py``: what something is: a metric, the user's or a framework's, a part of Lightning.
"""
