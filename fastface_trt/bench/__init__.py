"""Latency: what a picture costs, stage by stage, on this machine."""
