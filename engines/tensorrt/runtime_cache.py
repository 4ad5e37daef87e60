"""TensorRT-RTX's runtime cache on the disk: kernels that it compiled for this GPU, kept for later.

The file lies beside the cache's entries, not in one: an entry is verified against its manifest and
never changes. Its name holds all that its contents depend on, and it starts with their SHA-256, so
a file that was cut short never reaches TensorRT. TensorRT-RTX compares the rest with the machine
itself and refuses what does not fit; such a file is deleted and written anew.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_DIGEST_BYTES = 32


class RuntimeCacheFile:
    """The runtime cache of one engine on one GPU; `cache` is TensorRT-RTX's object for it."""

    def __init__(
        self, entry: Path, key: str, version: str, gpu: Mapping[str, str], cache: Any
    ) -> None:
        where = hashlib.sha256(repr((version, sorted(gpu.items()))).encode()).hexdigest()
        self.path = entry.parent / "runtime" / f"{key}-{where[:16]}.cache"
        self._cache = cache
        self._known = b""

    def load(self) -> bool:
        """Take in the file; False, and no file any more, where there is none that fits."""
        content = b""
        with suppress(OSError):
            content = self.path.read_bytes()
        digest, blob = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if blob and hashlib.sha256(blob).digest() == digest and self._cache.deserialize(blob):
            self._known = digest
            return True
        with suppress(OSError):
            self.path.unlink()
        return False

    def save(self) -> None:
        """Write the cache if it holds something new. A full or read-only disk costs only time."""
        serialized = self._cache.serialize()
        blob = b"" if serialized is None else bytes(memoryview(serialized))
        digest = hashlib.sha256(blob).digest()
        if not blob or digest == self._known:
            return
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(digest + blob)
            os.replace(draft, self.path)
            self._known = digest
        except OSError:
            with suppress(OSError):
                draft.unlink()
