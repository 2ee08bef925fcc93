"""Background jobs: the queue, its database and the gallery."""
