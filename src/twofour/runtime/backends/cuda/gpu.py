"""One GPU as the runtime uses it: memory, streams, events, graphs. The only file of the backend that calls the driver."""

from contextlib import AbstractContextManager
from typing import Any

from twofour.jit import driver
from twofour.jit.driver import bindings, check


class Gpu:
    """GPU `device`. Streams, events and graphs are integers or the driver's own objects; streams may be used from any thread."""

    def __init__(self, device: int = 0) -> None:
        """Open the GPU.

        Raises:
            MissingExtraError, UnsupportedError: no bindings, driver or GPU.
        """
        self.device = device
        with self.use():
            self.num_sms = driver.num_sms(device)

    def use(self) -> AbstractContextManager[None]:
        """Make the GPU current in this thread for a while, as most of the other functions expect."""
        return driver.on_device(self.device)

    def alloc(self, size: int) -> int:
        """Return the address of `size` bytes.

        Raises:
            UnsupportedError: there is not enough memory.
        """
        with self.use():
            return int(check(bindings().cuMemAlloc(max(size, 16)), f"allocating {size:,} bytes on GPU {self.device}"))

    def free(self, address: int) -> None:
        """Give memory back, once all work that uses it has finished."""
        with self.use():
            check(bindings().cuMemFree(address), "freeing memory")

    def stream(self) -> int:
        """Return a new stream that does not wait for the default one."""
        return int(check(bindings().cuStreamCreate(1), "making a stream"))

    def free_stream(self, stream: int) -> None:
        """Free a stream; what it still has to do is done."""
        check(bindings().cuStreamDestroy(stream), "freeing a stream")

    def synchronize(self, stream: int) -> None:
        """Wait until a stream's work is done."""
        check(bindings().cuStreamSynchronize(stream), "waiting for the GPU")

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Put a copy within the GPU on a stream."""
        check(bindings().cuMemcpyDtoDAsync(to, source, size, stream), "copying on the GPU")

    def upload(self, to: int, host: int, size: int, stream: int) -> None:
        """Put a copy from host memory on a stream."""
        check(bindings().cuMemcpyHtoDAsync(to, host, size, stream), "copying to the GPU")

    def download(self, host: int, source: int, size: int, stream: int) -> None:
        """Put a copy to host memory on a stream."""
        check(bindings().cuMemcpyDtoHAsync(host, source, size, stream), "copying from the GPU")

    def zero(self, address: int, size: int, stream: int) -> None:
        """Put zeroing on a stream."""
        check(bindings().cuMemsetD8Async(address, 0, size, stream), "zeroing memory")

    def event(self) -> Any:
        """Return a new event."""
        return check(bindings().cuEventCreate(0), "making an event")

    def record(self, event: Any, stream: int) -> None:
        """Mark the work a stream has so far."""
        check(bindings().cuEventRecord(event, stream), "recording an event")

    def wait(self, stream: int, event: Any) -> None:
        """Let a stream wait for marked work."""
        check(bindings().cuStreamWaitEvent(stream, event, 0), "ordering two streams")

    def wait_for(self, event: Any) -> None:
        """Wait until marked work is done; nothing where there is none."""
        check(bindings().cuEventSynchronize(event), "waiting for the GPU")

    def free_event(self, event: Any) -> None:
        """Free an event."""
        check(bindings().cuEventDestroy(event), "freeing an event")

    def elapsed_us(self, begin: Any, end: Any) -> float:
        """Return microseconds between two events that have passed."""
        return float(check(bindings().cuEventElapsedTime(begin, end), "reading events")) * 1000

    def is_capturing(self, stream: int) -> bool:
        """Return whether a stream's owner is recording a graph on it; the default stream cannot be recorded."""
        return stream != 0 and int(check(bindings().cuStreamIsCapturing(stream), "asking a stream")) != 0

    def begin_capture(self, stream: int) -> None:
        """Record launches on a stream instead of running them."""
        mode = bindings().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        check(bindings().cuStreamBeginCapture(stream, mode), "capturing a graph")

    def end_capture(self, stream: int) -> Any:
        """Return the recorded launches, ready to run."""
        d = bindings()
        graph = check(d.cuStreamEndCapture(stream), "capturing a graph")
        made = check(d.cuGraphInstantiate(graph, 0), "instantiating a graph")
        check(d.cuGraphDestroy(graph), "freeing a graph")
        return made

    def abandon_capture(self, stream: int) -> None:
        """End a capture whose launches failed."""
        graph = bindings().cuStreamEndCapture(stream)[1]
        if graph is not None and int(graph):
            bindings().cuGraphDestroy(graph)

    def launch_graph(self, graph: Any, stream: int) -> None:
        """Put a graph on a stream."""
        check(bindings().cuGraphLaunch(graph, stream), "launching a graph")

    def free_graph(self, graph: Any) -> None:
        """Free a graph."""
        with self.use():
            check(bindings().cuGraphExecDestroy(graph), "freeing a graph")
