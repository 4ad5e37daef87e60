"""FastFace inside other programs: tensors without copies, pictures in their memory, C and C++.

`session` is the Python surface, which takes and gives other libraries' tensors, `host` what the C
library of `src/` calls, `__main__` says where its sources lie; docs/embedding.md is their page.
"""
