"""The command line: configuration, the run and its demonstration model."""
