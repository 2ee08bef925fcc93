"""What runs the networks: PyTorch, OpenVINO, compiled, in 8 bits."""
