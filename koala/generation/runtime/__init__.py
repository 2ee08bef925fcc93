"""What runs the networks: PyTorch, OpenVINO, compiled blocks, CUDA graphs."""
