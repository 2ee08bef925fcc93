"""Captioned pictures: from the packages that carry them to the shards that a trainer reads."""
