"""Attention kernels: a switch for the kernel that PyTorch's SDPA runs, and the adapter that puts it on a model."""
