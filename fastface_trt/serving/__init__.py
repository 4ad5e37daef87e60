"""Serving: one process with a batcher, one machine with workers behind HTTP, many machines.

Layers, each of which knows only those before it:

- `work`: what is asked of a worker and what it tells on the way;
- `batching`: a worker inside one process, whose UNet calls hold rows of strangers;
- `workers`: the same worker in a child process per device, started again when it dies;
- `http`: the HTTP surface over any worker, and `ui`, a page that uses it;
- `ray` and `triton`: the same worker in other people's servers; `deploy`: containers, sizing.
"""
