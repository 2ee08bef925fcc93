"""Checkpoints on disk: weights files, model folders, single files, model cards."""
