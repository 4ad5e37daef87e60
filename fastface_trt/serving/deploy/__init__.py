"""Containers, Kubernetes and sizing."""
