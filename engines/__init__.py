"""Engines: what runs a module (`engine`), how one is built and where it is kept (`cache`).

Nothing here imports torch. `manifest` holds the types that export and runtime share.
"""
