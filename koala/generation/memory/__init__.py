"""Models larger than the device's memory: the plan, and how it is carried out."""
