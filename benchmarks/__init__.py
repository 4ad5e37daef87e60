"""Measurements of this project, as commands that anyone can run; results lie in `results/`."""
