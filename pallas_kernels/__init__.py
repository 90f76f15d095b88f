"""Kernels of jaxheads; they know nothing of models."""
