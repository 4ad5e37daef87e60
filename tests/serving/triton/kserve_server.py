"""A loopback HTTP server that speaks KServe v2 with binary tensors, over an `Instance`.

BYTES are read and written with `tritonclient.utils`, so that not both ends are ours.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from tests.serving.triton.triton_server import Refused

DTYPES = {"UINT8": np.uint8, "UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32}
STATUS = {"INVALID_ARG": 400, "UNAVAILABLE": 503, "CANCELLED": 499}
HEAD = "Inference-Header-Content-Length"


@contextmanager
def serve(instance):
    """The address of a server for `instance`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            known = self.path in ("/v2/health/ready", "/v2/models/fastface/ready")
            self._answer(200 if known and instance.model.is_ready() else 404, b"")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                arrays, outputs = read(body, int(self.headers[HEAD]))
                (sent,) = instance.execute(arrays, outputs=tuple(outputs))
                self._answer(200, *write(sent.wait()))
            except Refused as error:
                text = json.dumps({"error": str(error)}).encode()
                self._answer(STATUS.get(error.code, 500), text)
            except ValueError as error:
                self._answer(400, json.dumps({"error": str(error)}).encode())

        def _answer(self, status, body, head=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if head is not None:
                self.send_header(HEAD, str(head))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="kserve")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def read(body, head_bytes):
    """Arrays by name and the names of the outputs that are asked for in binary."""
    head = json.loads(body[:head_bytes])
    arrays, place = {}, head_bytes
    for tensor in head["inputs"]:
        size = tensor["parameters"]["binary_data_size"]
        block, place = body[place : place + size], place + size
        if len(block) != size:
            raise ValueError("the body is shorter than its head says")
        if tensor["datatype"] == "BYTES":
            array = deserialize_bytes_tensor(block)
        else:
            array = np.frombuffer(block, DTYPES[tensor["datatype"]])
        arrays[tensor["name"]] = array.reshape(tensor["shape"])
    if place != len(body):
        raise ValueError("the body is longer than its head says")
    outputs = [one["name"] for one in head["outputs"] if one["parameters"]["binary_data"]]
    return arrays, outputs


def write(arrays):
    """The body of an answer, and the length of its head."""
    blocks = {
        name: serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        for name, array in arrays.items()
    }
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    head = json.dumps(
        {
            "model_name": "fastface",
            "model_version": "1",
            "outputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": names.get(array.dtype, "BYTES"),
                    "parameters": {"binary_data_size": len(blocks[name])},
                }
                for name, array in arrays.items()
            ],
        }
    ).encode()
    return b"".join((head, *blocks.values())), len(head)
