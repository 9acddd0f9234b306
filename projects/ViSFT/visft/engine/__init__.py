"""Stages, trainers, hooks, and what the command-line tools run."""
