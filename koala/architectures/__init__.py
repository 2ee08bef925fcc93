"""U-Net architectures as data, and everything that follows from them without torch."""
