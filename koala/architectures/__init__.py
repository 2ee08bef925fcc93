"""What a U-Net of each kind is, as data, and all that follows from it without torch."""
