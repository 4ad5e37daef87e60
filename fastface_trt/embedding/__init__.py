"""Embedding in other programs: tensors without copies, streams of theirs, C and C++ hosts."""
