"""``nn.Module``: facts about modules, and interception of their calls and attributes.

- ``attributes.py``: attributes of modules that a graph may freeze, and their comparison.
- ``compilation.py``: compiles the networks of a module for the time of a stage.
- ``compiled.py``: submodules that run under ``torch.compile``, whose code cannot be watched.
- ``interception.py``: intercepts calls and attributes of one module object, and changes neither
  the object nor its type.
- ``kinds.py``: kinds of modules, classes and files: metric, user, framework, Lightning.
"""
