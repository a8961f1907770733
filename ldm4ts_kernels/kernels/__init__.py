"""Triton attention kernels. They import torch, triton and each other, nothing else."""
