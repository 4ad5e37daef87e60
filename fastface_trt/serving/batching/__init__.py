"""A worker inside this process: continuous batching over UNet steps."""
