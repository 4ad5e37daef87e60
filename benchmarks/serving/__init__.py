"""Three ways to serve the same requests: one by one, static batches, continuous batching.

`servers` and `simulation` play them in simulated time over what a machine's calls cost (`machine`);
`measured` runs them on the mini model. `python -m benchmarks.serving` does both.
"""
