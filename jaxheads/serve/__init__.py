"""Serving: continuous batching over a pool of pages."""
