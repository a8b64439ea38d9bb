"""What a captured step leaves behind beside its output: metric states, logged values, and torchmetrics' own bookkeeping."""
