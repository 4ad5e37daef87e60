"""Engines: what runs a module (`engine`), how one is built and where it is kept (`cache`).

Tensors live on a `device`: the host, or a GPU (`cuda`). `manifest` holds the types that export and
runtime share. Nothing here imports torch.
"""
