"""The text of ``cg-lightning --help``. ``$APP_CONFIG_GROUPS`` is filled in by Hydra."""

HELP = """\
cg-lightning runs a LightningModule with CUDA graphs, and compares with eager.

Usage: cg-lightning [task=TASK] [key=value ...] [--multirun]

Tasks
  fit       fit, then test and predict, as far as there are any (default)
  validate  trainer.validate
  test      trainer.test
  predict   trainer.predict
  diagnose  why a step is not one graph; needs no GPU; exit status 1 if not
  shapes    shapes of a dataloader, sizes to pad batches to; needs no GPU
  bench     the benchmark; needs a GPU
  zoo       models of other libraries; needs a GPU; status 1 if one differs

Options
  model._target_=package.Class +model.ARGUMENT=VALUE  your LightningModule
  data=custom data._target_=package.Class +data.ARGUMENT=VALUE  your data
  trainer=auto|cpu|gpu  trainer.KEY=VALUE  +trainer.KEY=VALUE  for Trainer
  cuda_graph=full_and_piecewise|full|piecewise|off|debug  mode of the graphs
  cuda_graph.KEY=VALUE             arguments of CUDAGraphCallback
  stage=validate|test|predict      for task=diagnose and task=shapes
  compare=false                    do not run again without graphs
  seed=0  ckpt_path=FILE
All keys with their values: cg-lightning --cfg job

Examples
  cg-lightning
  cg-lightning task=predict cuda_graph.mode=FULL data.batch_size=32
  cg-lightning task=diagnose model._target_=my.Model data=custom \\
      data._target_=my.Data
  cg-lightning --multirun task=validate cuda_graph=off,piecewise,full
  cg-lightning task=bench bench.cases=[mlp,bert]

Groups (group=option)
$APP_CONFIG_GROUPS
Tab completion in bash: eval "$$(cg-lightning --shell-completion install=bash)"
Options of Hydra itself: cg-lightning --hydra-help
"""
