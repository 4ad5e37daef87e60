"""Serving: pictures for many clients at once, by HTTP, Ray Serve or Triton, on one device or many.

The life of a request, in ten lines:

1. `http.protocol` takes the connection: bounded heads and chunks, and time for asking and reading.
2. `http.middleware`: `RequestLog` gives it an id, `Gate` looks at its key, its client's rate and
   `http.admission`, `BodyLimit` bounds its body.
3. `http.images` reads the body (`http.bodies`) into a `GenerationBody` (`http.schemas`).
4. `http.work_order` checks it and makes one `GenerationRequest` per picture.
5. Its face: registered (`http.faces`), or a file that `runtime.intake` takes apart, perhaps from an
   address (`pictures.fetch`); an operator's `pictures.checks` may refuse; the worker analyses it.
6. The `WorkOrder` holds a `Task` per picture; `http.tasks` submits them all or none.
7. `workers.pool` gives each task to the least busy process, and again to another should that die.
8. `workers.child` hands it to its `batching` loop, where its rows share UNet calls with strangers'.
9. Events come back the same way: `StepDone` for each step, then `PictureDone` or `TaskFailed`.
10. `WorkOrder.picture` encodes, marks and signs (`pictures.provenance`) the file; `http.responses`
    or `http.errors` makes the answer, `http.images` the stream.

Who knows whom: `work` (what a worker is) and `settings` (every limit) know nobody here; `batching`,
`workers` and `http` know them; `ray` and `triton` put the same worker into other people's servers.
`storage` brings exports and engines by content hash; `ui` is a page over the HTTP surface, `deploy`
holds containers.
"""
