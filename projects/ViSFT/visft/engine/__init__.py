"""One run: its checks, stages, trainer, hooks and optimizer."""
