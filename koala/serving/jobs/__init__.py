"""Images drawn in the background: the queue, its database, the gallery."""
