"""The HTTP surface over a worker."""
