"""Build one plan file in a child process: network, profiles and options in, bytes on the disk out.

Why a process: Ctrl-C can end it at any moment, a crash or the system's out-of-memory killer takes
only the build with it, and every byte that the builder took goes back. The job goes in as one line
of JSON on standard input, events come out as lines of JSON on standard output. A child whose parent
died reads the end of its input and leaves.

Peak memory is what TensorRT itself allocates: the weights are the ONNX file's mapping, which the
system can drop at any time, and the finished plan is written from where TensorRT made it.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from typing_extensions import Self

from fastface_trt.engines.children import leave_with_parent, start_child
from fastface_trt.engines.files import write_durably
from fastface_trt.engines.manifest import ModuleSpec, Strict
from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.tensorrt.flavour import Flavour, FlavourName, find_flavour
from fastface_trt.engines.tensorrt.network import MessageLog, name_weights, parse
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.engines.tensorrt.profiles import Profile, make_profiles
from fastface_trt.engines.weight_map import digest_weights, make_map
from fastface_trt.errors import BackendUnavailable, BuildFailed, FastFaceError

PLAN = "engine.plan"
_PIECE = 2**26

Event = Mapping[str, Any]
"""What happens during a build: `event` is phase, step, end, or message; see `watch`."""


def build_plan(
    flavour: Flavour,
    options: TensorRTOptions,
    module: ModuleSpec,
    source: Path,
    target: Path,
    *,
    timing_cache: Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Write `target`/engine.plan and return the facts for the manifest's build report.

    Raises `BuildFailed`, `BackendUnavailable`, or `OSError` for a disk that is full.
    """
    binding = flavour.module()
    log = MessageLog(binding)
    began = perf_counter()
    with OnnxFile(source / module.files[0].path) as onnx, MemoryPeak(onnx.drop_pages) as memory:
        builder = binding.Builder(log.logger)
        if builder is None:  # how the binding reports a driver that it cannot use
            raise BackendUnavailable(f"{flavour.label} has no builder here: {log.reason()}", "")
        network, parser = parse(
            flavour,
            binding,
            builder,
            log,
            module,
            onnx,
            attention_plugin=options.attention_plugin,
        )
        # Not earlier: a parser puts a recorder of its own into the network, and with two of them
        # the network's destructor crashes.
        log.attach(builder)
        if options.refittable or options.strip_weights:
            named = name_weights(binding, network, log, onnx)
            make_map(onnx, digest_weights(onnx), named).write(target)
        layers = network.num_layers
        on_event({"event": "parsed", "layers": layers, "seconds": perf_counter() - began})
        config = _configure(flavour, binding, builder, network, options, module, log)
        cache_file = None if timing_cache is None else measurements(timing_cache, options)
        cache = _load_timing_cache(flavour, config, cache_file)
        _fix_tactics(binding, cache, options, log)
        monitor = _monitor(binding, on_event)
        config.progress_monitor = monitor
        # Not build_serialized_network_to_stream: the binding hands its writer one Python bytes of
        # the whole plan, which is one copy more than this.
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildFailed(
                f"{flavour.label} cannot build {module.name}: {log.reason()}", _hint(log)
            )
        with open(target / PLAN, "wb", buffering=0) as file:
            write_all(file, memoryview(plan))
        if not options.tactics:  # they are of this engine alone
            _save_timing_cache(cache, cache_file)
        del parser  # it owns what the network refers to, and must go last
    return {
        "layers": layers,
        "peak_anonymous_bytes": memory.anonymous,
        "peak_resident_bytes": memory.resident,
        "warnings": log.warnings[:20],
    }


def _configure(
    flavour: Flavour,
    binding: Any,
    builder: Any,
    network: Any,
    options: TensorRTOptions,
    module: ModuleSpec,
    log: MessageLog,
) -> Any:
    config = builder.create_builder_config()
    flags = binding.BuilderFlag
    for chosen, flag in (
        (options.weight_streaming, flags.WEIGHT_STREAMING),
        (options.refittable, flags.REFIT),
        (options.strip_weights, flags.STRIP_PLAN),
        (options.version_compatible, flags.VERSION_COMPATIBLE),
        (options.tf32, flags.TF32),
        (options.editable_timing_cache or options.tactics, flags.EDITABLE_TIMING_CACHE),
    ):
        # Cleared as well as set: TF32 is on unless someone says otherwise.
        (config.set_flag if chosen else config.clear_flag)(flag)
    if options.hardware_compatible:
        config.hardware_compatibility_level = binding.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.same_compute_capability:
        level = binding.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        config.hardware_compatibility_level = level
    if options.max_tactics is not None:
        config.max_num_tactics = options.max_tactics
    if options.l2_limit_mb is not None:
        config.l2_limit_for_tiling = int(options.l2_limit_mb * 2**20)
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.build_route:
        config.build_route = options.build_route
        if config.build_route != options.build_route:  # it says why only in its log
            raise BuildFailed(
                f"{flavour.label} does not take the build route {options.build_route!r}: "
                f"{log.reason()}",
                "Give settings that it lists, as -name=value with spaces between them.",
            )
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    config.tiling_optimization_level = getattr(
        binding.TilingOptimizationLevel, options.tiling.upper()
    )
    if options.workspace_gb is not None:
        config.set_memory_pool_limit(
            binding.MemoryPoolType.WORKSPACE, int(options.workspace_gb * 2**30)
        )
    # Layer names stay in the plan, so that a profile or `verify --layers` can speak of them.
    config.profiling_verbosity = binding.ProfilingVerbosity.DETAILED
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            capability = getattr(binding.ComputeCapability, target.upper())
            if not config.set_compute_capability(capability, index):
                raise BuildFailed(f"{flavour.label} does not build for {target}.", log.reason())
    for profile in make_profiles(module, options):
        _add_profile(flavour, builder, network, config, profile, module)
    return config


def _add_profile(
    flavour: Flavour, builder: Any, network: Any, config: Any, profile: Profile, module: ModuleSpec
) -> None:
    added = builder.create_optimization_profile()
    for name in profile.best:
        added.set_shape(name, profile.smallest[name], profile.best[name], profile.largest[name])
    if config.add_optimization_profile(added) < 0:
        raise BuildFailed(
            f"{flavour.label} does not take the profile {profile.words()} of {module.name}.",
            "Choose sizes that the export allows.",
        )


def _monitor(binding: Any, on_event: Callable[[Event], None]) -> Any:
    """TensorRT's progress as events; TensorRT calls it from several threads."""
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            on_event(event)

    class Monitor(binding.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            binding.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(
                {
                    "event": "phase",
                    "name": phase_name,
                    "parent": parent_phase or "",
                    "steps": num_steps,
                }
            )

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell({"event": "step", "name": phase_name, "step": step + 1})
            return True

        def phase_finish(self, phase_name: str) -> None:
            tell({"event": "end", "name": phase_name})

    return Monitor()


def write_all(file: RawIOBase, content: memoryview) -> None:
    """Write a plan in pieces: one system call writes at most 2 GB."""
    done = 0
    while done < len(content):
        done += file.write(content[done : done + _PIECE]) or 0


def measurements(file: Path, options: TensorRTOptions) -> Path:
    """The timing cache's file; an editable one has keys of its own and lies beside `file`."""
    editable = options.editable_timing_cache or options.tactics
    return file.with_suffix(".editable.cache") if editable else file


def read_tactics(flavour: Flavour, file: Path) -> list[tuple[str, str, float]]:
    """Key, hash of the tactic, and milliseconds of every entry of an editable timing cache.

    Raises `InvalidRequest` for a flavour without timing caches, `BackendUnavailable` without a GPU.
    Not run on a GPU: TensorRT-RTX, the flavour that was run, keeps no timings.
    """
    flavour.require("timing_cache")
    binding = flavour.module()
    log = MessageLog(binding)
    builder = binding.Builder(log.logger)
    if builder is None:
        raise BackendUnavailable(f"{flavour.label} has no builder here: {log.reason()}", "")
    config = builder.create_builder_config()
    config.set_flag(binding.BuilderFlag.EDITABLE_TIMING_CACHE)
    cache = _load_timing_cache(flavour, config, file)
    found = []
    for key in cache.queryKeys():
        timing = cache.query(key)
        found.append((str(key), hex(timing.tacticHash), float(timing.timingMSec)))
    return found


def _fix_tactics(binding: Any, cache: Any, options: TensorRTOptions, log: MessageLog) -> None:
    """Replace the measured tactic of each key by the wanted one, which TensorRT then builds."""
    if options.tactics and cache is None:
        raise BuildFailed(
            "Tactics are fixed in a timing cache, and this build has none.",
            "Build into an engine cache, or give the builder the file `timing_cache`.",
        )
    for tactic in options.tactics:
        name, _, wanted = tactic.partition("=")
        key = binding.TimingCacheKey.parse(name)
        timing = cache.query(key)
        fixed = binding.TimingCacheValue(int(wanted, 16), timing.timingMSec)
        # A key that is not there has a time of -1; one that is not a number would take it out.
        if not timing.timingMSec >= 0 or not cache.update(key, fixed):
            raise BuildFailed(
                f"The timing cache does not take the tactic {wanted} for {name}: {log.reason()}",
                "Build with --editable-timing-cache first; `fastface-trt cache tactics` lists "
                "its keys.",
            )


def _load_timing_cache(flavour: Flavour, config: Any, file: Path | None) -> Any:
    if file is None or "timing_cache" not in flavour.supports:
        return None
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(cache: Any, file: Path | None) -> None:
    if cache is None or file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, memoryview(cache.serialize()))


def _hint(log: MessageLog) -> str:
    text = log.reason()
    if "graph_jit" in text or "CUDA driver" in text or "cudaError" in text:
        return "This build needs a GPU: refittable and stripped engines always do."
    if "memory" in text.lower():
        return "Free some memory, or build with fewer profiles (--branches, --requests)."
    return "Export the module again; if that does not help, report the message."


_STATUS = Path("/proc/self/status")
_SECONDS_BETWEEN = 0.5
_DROP_ABOVE_BYTES = 2**30


class MemoryPeak:
    """Samples this process's memory while its block runs: `anonymous` and `resident` bytes.

    Anonymous memory is what the process allocated; resident memory counts mapped files as well,
    which the system can drop and read again. `drop_pages` is called when more than 1 GB (2³⁰ bytes)
    of those are resident. Both stay 0 where /proc does not exist.
    """

    def __init__(self, drop_pages: Callable[[], None] = lambda: None) -> None:
        self.anonymous = 0
        self.resident = 0
        self._drop_pages = drop_pages
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory peak", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while _STATUS.exists():
            sizes = _sizes()
            self.anonymous = max(self.anonymous, sizes["RssAnon"])
            self.resident = max(self.resident, sizes["VmRSS"])
            if sizes["RssFile"] > _DROP_ABOVE_BYTES:
                self._drop_pages()
            if self._stop.wait(_SECONDS_BETWEEN):
                return


def _sizes() -> dict[str, int]:
    sizes = dict.fromkeys(("VmRSS", "RssAnon", "RssFile"), 0)
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    return sizes


_ERRORS = {kind.code: kind for kind in (BuildFailed, BackendUnavailable)}
_OUT_OF_MEMORY_KILL = -9


class Job(Strict):
    """What a child builds: a module whose ONNX lies in `source`, into folder `target`."""

    flavour: FlavourName
    options: TensorRTOptions
    module: ModuleSpec
    source: str
    target: str
    timing_cache: str | None = None


def run_in_child(job: Job, on_event: Callable[[Event], None]) -> dict[str, Any]:
    """Build in a child process; returns `build_plan`'s facts.

    Raises what `build_plan` raises. An exception in `on_event`, `KeyboardInterrupt` among them,
    ends the child first and then goes on.
    """
    child = start_child(
        ["-m", "fastface_trt.engines.tensorrt.plan"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # Popen gives pipes whenever it is asked for them.
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    noise = _Tail(child.stderr)
    try:
        with suppress(BrokenPipeError):  # it crashed at once, and what it said follows
            child.stdin.write(job.model_dump_json().encode() + b"\n")
            child.stdin.flush()
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "built":
                return dict(event["facts"])
            if event["event"] == "failed":
                raise _error(event)
            on_event(event)
        raise _died(job, child.wait(), noise.text())
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            with suppress(BrokenPipeError):  # a child that never read its job
                pipe.close()


def _error(event: Event) -> Exception:
    if event.get("errno"):
        return OSError(event["errno"], event["message"], event["file"])
    return _ERRORS[event["code"]](event["message"], event["hint"])


def _died(job: Job, status: int, noise: str) -> BuildFailed:
    label = find_flavour(job.flavour).label
    if status == _OUT_OF_MEMORY_KILL:
        return BuildFailed(
            f"The system ended {label} while it was building {job.module.name}, most likely "
            "because memory ran out.",
            "Free some memory, or build with fewer profiles (--branches, --requests).",
        )
    return BuildFailed(
        f"{label} crashed while it was building {job.module.name} (status {status}): "
        f"{noise or 'it said nothing'}",
        "Export the module again; if that does not help, report the message.",
    )


class _Tail:
    """The end of what a child prints, read as it comes so that the child never blocks on it."""

    def __init__(self, pipe: Any) -> None:
        self._end = b""
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            self._end = (self._end + line)[-2000:]

    def text(self) -> str:
        self._thread.join(timeout=5)
        lines = self._end.decode(errors="replace").split("\n")
        return " ".join(" ".join(lines).split())[-300:]


def main() -> None:
    """Read a job, build it, and print events; for `run_in_child`."""
    leave_with_parent(0)
    # C++ code prints to standard output as it likes; the events get a way of their own.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    job = Job.model_validate_json(sys.stdin.buffer.readline())

    def say(event: Event) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        facts = build_plan(
            find_flavour(job.flavour),
            job.options,
            job.module,
            Path(job.source),
            Path(job.target),
            timing_cache=Path(job.timing_cache) if job.timing_cache else None,
            on_event=say,
        )
        say({"event": "built", "facts": facts})
    except FastFaceError as error:
        code = error.code if error.code in _ERRORS else BuildFailed.code
        say({"event": "failed", "code": code, "message": error.message, "hint": error.hint})
    except OSError as error:
        say(
            {
                "event": "failed",
                "errno": error.errno,
                "message": error.strerror,
                "file": str(error.filename or job.target),
            }
        )
    # TensorRT's destructors take seconds for a large network, and nobody waits for them.
    events.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
