"""Rewrites of exported graphs into the form that an execution provider runs fastest."""
