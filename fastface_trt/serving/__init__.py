"""Serving: one process with a batcher, one machine with workers behind HTTP, many machines.

Layers, each of which knows only those before it:

- `work`: what is asked of a worker and what it tells on the way; `settings`: every limit;
- `batching`: a worker inside one process, whose UNet calls hold rows of strangers;
- `workers`: the same worker in a child process per device, started again when it dies;
- `http`: the HTTP surface over any worker, and `ui`, a page that uses it;
- `ray` and `triton`: the same worker in other people's servers; `deploy`: containers, sizing.

Beside them, for what comes from outside and what goes there:

- `intake`, with `picture_files` and `exif`: a stranger's picture, taken apart before it is decoded;
- `fetch`, with `addresses`: pictures by address, from public ones only;
- `checks`: an operator's own checks of prompts and pictures; `provenance`: signatures (C2PA);
- `distribution`, with `release`, `storage` and `local_objects`: exports and engines by content
  hash, to and from shared storage.
"""
