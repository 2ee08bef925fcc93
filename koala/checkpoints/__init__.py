"""Everything from disk to disk: weights files, model folders, single files, model cards."""
