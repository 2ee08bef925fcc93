"""What SDXL gets from others and the mini family has to make itself: a VAE and a text side."""
