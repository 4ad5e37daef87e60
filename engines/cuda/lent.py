"""Memory of a device that others hold: it outlives the device, and with it the GPU's context."""

from contextlib import suppress

from fastface_trt.engines.cuda.driver import Driver, Handle
from fastface_trt.errors import FastFaceError


class LentMemory:
    """Which memory of GPU `ordinal` was lent; shared by the streams of a device.

    What was lent once may be held by others until its `Memory` ends, so a closing stream leaves it.
    """

    def __init__(self, driver: Driver, device: Handle, context: Handle, ordinal: int) -> None:
        self.ordinal = ordinal
        self._driver, self._device, self._context = driver, device, context
        self._lent: set[int] = set()
        self._outliving: set[int] = set()

    def add(self, address: int, written_on: Handle, stream: int | None) -> None:
        """Lend it; work that follows on CUDA stream `stream` waits for `written_on`."""
        self._lent.add(address)
        if stream is not None:
            with self._driver.context(self._context):
                self._driver.stream_follow_once(self._driver.stream(stream), written_on)

    def forget(self, address: int) -> None:
        """It is freed where it came from."""
        self._lent.discard(address)

    def outlive(self, addresses: set[int]) -> set[int]:
        """Those of `addresses` that stay when their stream is closed; the context stays for them.

        Their pool may go: CUDA keeps it until the last of its memory is freed.
        """
        staying = addresses & self._lent
        for address in staying:
            self._driver.retain_context(self._device)
            self._outliving.add(address)
        return staying

    def end(self, address: int) -> None:
        """Nobody holds it any more, after its stream was closed. On any thread, in any context."""
        try:
            self._outliving.remove(address)
        except KeyError:  # not lent, or the other of two threads was first
            return
        self._lent.discard(address)
        with suppress(FastFaceError):  # a broken GPU has nothing to free; nobody can be told
            with self._driver.context(self._context):
                self._driver.mem_free(address)
            self._driver.release_context(self._device)
