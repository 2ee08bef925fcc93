"""SDXL's LoRAs on SDXL and on its students: read, carried over, applied, converted."""
