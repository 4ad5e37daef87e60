"""Training of the mini model, stage by stage; only this package and `export` import torch."""
