"""Exports and engines in shared storage, by content."""
