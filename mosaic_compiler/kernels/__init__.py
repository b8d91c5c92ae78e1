"""Kernels of our own, each with its plain-PyTorch reference beside it."""
