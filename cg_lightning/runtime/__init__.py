"""Who runs a step, and how that is decided.

- ``ahead.py``: captures graphs of batches that have not come yet.
- ``alike_runs.py``: runs of steps that may go the way of a watched one.
- ``alike_steps.py``: padded steps of other shapes that go the same way: not each is watched.
- ``changing_values.py``: plain values that differ in every batch, such as file names.
- ``costs.py``: what captures and comparisons cost, as measured.
- ``dispatcher.py``: the only place that decides in which mode a step or a call runs.
- ``eager_run.py``: the eager run that the graph of a padded batch is compared with.
- ``examples.py``: batches that are captured ahead, as the runtime sees them.
- ``first_difference.py``: looks for the first operation in which a replay differs from eager.
- ``keys.py``: what is known of keys: variants, guards, graphs.
- ``ledger.py``: the account of a family of keys: a capture must pay for itself.
- ``outcome.py``: the result of a step or a call, with its mode and its reason.
- ``padded_pieces.py``: submodules that are padded, in steps that are not.
- ``padded_shapes.py``: which batches of a step are padded, and how.
- ``padded_steps.py``: steps whose batches are padded up to a size that is captured.
- ``plans.py``: the decisions of the dispatcher, as records.
- ``profiling.py``: ranges that profilers and traces show.
- ``seen_shapes.py``: the shapes that a stage has seen, and which settings would have caught them.
- ``session.py``: one module in one run: builds, starts and stops the parts.
- ``stage_length.py``: the number of batches of a stage, as the runtime sees it.
- ``step_runner.py``: replaces one step method of a module.
- ``submodule_runner.py``: replaces the calls of one submodule in steps that run PIECEWISE.
- ``submodules.py``: all submodules of a module that run from graphs.
- ``target.py``: a step or a submodule that may run from graphs.
- ``targets.py``: the submodules that the user named.
- ``trial.py``: finds out if graphs save time.
- ``verifier.py``: compares replays with eager, on the user's own batches.
"""
