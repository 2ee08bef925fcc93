"""The illustration set: emoji and icons, alone and in scenes, with captions."""
