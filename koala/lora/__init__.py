"""LoRAs of SDXL on SDXL and on its students: reads, maps, applies and converts them."""
