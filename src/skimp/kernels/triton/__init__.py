"""Triton kernels for GPUs. Each has its plain reference, and a test that equates the two."""
