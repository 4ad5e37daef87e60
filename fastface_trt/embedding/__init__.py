"""FastFace inside other programs: tensors without copies, pictures in the caller's memory, C, C++.

`foreign` takes other libraries' tensors, `session` is the Python surface over them, `host` is what
the C library of `src/` calls, `paths` says where its sources lie. README.md is the page about all.
"""
