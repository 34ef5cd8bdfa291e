"""The engine on onnxruntime's CPU kernels, training wheel or stock alike.

The only module of a peer that imports onnxruntime, and only when an engine is opened, after
telemetry has been switched off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

from p2ptrain.bundle.protobuf import append_externals
from p2ptrain.engine import build as builds
from p2ptrain.engine.constants import BoundConstants, bind_constants, constants_key
from p2ptrain.engine.contract import Array, Buffer, Engine
from p2ptrain.errors import EngineError, InvariantBroken
from p2ptrain.training.contract import RuntimeBuild

ALIGNMENT_BYTES: Final = 64
_TRAINING_API: Final = "onnxruntime.training"
_IMPORT_LOCK: Final = threading.Lock()
"""Of two threads that open the first engines at once, each would take back the other's refusal."""
_REINSTALL: Final = (
    "remove every onnxruntime package (pip uninstall {names}), then: "
    "pip install --force-reinstall p2ptrain"
)


class CpuBuffer:
    """A tensor in main memory."""

    __slots__ = ("_array", "address")

    def __init__(self, array: Array) -> None:
        if not array.flags.c_contiguous:
            raise InvariantBroken("an engine buffer is contiguous")
        self._array = array
        self.address = int(array.ctypes.data)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:  # Any: the element type is data
        return self._array.dtype

    def host(self) -> Array:
        return self._array


class OnnxRuntimeBinding:
    """An IO binding by raw pointers: nothing is copied on the way in or out."""

    __slots__ = ("_binding", "_kept", "_program", "_session")

    def __init__(self, program: OnnxRuntimeProgram) -> None:
        self._program = program
        self._session = program.session
        self._binding = program.session.io_binding()
        self._kept: dict[str, Buffer] = {}

    def set_input(self, name: str, buffer: Buffer) -> None:
        if name not in self._program.input_names:
            raise EngineError(f"the graph has no input {name!r}")
        self._binding.bind_input(name, "cpu", 0, buffer.dtype, buffer.shape, _address(buffer))
        self._kept[name] = buffer

    def set_output(self, name: str, buffer: Buffer) -> None:
        if name not in self._program.output_names:
            raise EngineError(f"the graph has no output {name!r}")
        self._binding.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, _address(buffer))
        self._kept[name] = buffer

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise EngineError(f"onnxruntime could not run a graph: {_first_line(error)}") from error


class OnnxRuntimeProgram:
    """A session of one graph."""

    __slots__ = (
        "__weakref__",
        "_constants",
        "input_names",
        "inputs",
        "output_names",
        "outputs",
        "session",
    )

    def __init__(
        self,
        session: Any,  # Any: onnxruntime has no types
        constants: BoundConstants | None = None,
    ) -> None:
        self.session = session
        self._constants = constants  # the session may read their memory as long as it lives
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())
        self.input_names = frozenset(self.inputs)
        self.output_names = frozenset(self.outputs)

    def bind(self) -> OnnxRuntimeBinding:
        return OnnxRuntimeBinding(self)


class OnnxRuntimeEngine:
    """Compiles graphs into sessions of `threads` intra-op threads that share one arena."""

    def __init__(self, *, threads: int) -> None:
        self._runtime = import_onnxruntime()
        self._threads = threads
        self._programs: dict[bytes, OnnxRuntimeProgram] = {}
        self._with_constants: weakref.WeakValueDictionary[
            tuple[bytes, object], OnnxRuntimeProgram
        ] = weakref.WeakValueDictionary()
        with _ARENA_LOCK:
            _share_arena(self._runtime)

    @property
    def build(self) -> RuntimeBuild:
        return runtime_build()

    @property
    def threads(self) -> int:
        """Intra-op threads of every session."""
        return self._threads

    def compile(
        self, graph: bytes, constants: Mapping[str, Array] | None = None
    ) -> OnnxRuntimeProgram:
        key = hashlib.sha256(graph).digest()
        if constants:
            return self._compile_with(graph, key, constants)
        program = self._programs.get(key)
        if program is None:
            program = OnnxRuntimeProgram(self._session(graph))
            self._programs[key] = program
        return program

    def _compile_with(
        self, graph: bytes, digest: bytes, constants: Mapping[str, Array]
    ) -> OnnxRuntimeProgram:
        key = (digest, constants_key(constants))
        program = self._with_constants.get(key)
        if program is None:
            bound = bind_constants(constants, absolute=not _knows_folders(self._runtime))
            content = append_externals(graph, bound.externals)
            program = OnnxRuntimeProgram(self._session(content, bound), bound)
            self._with_constants[key] = program
        return program

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> CpuBuffer:
        return CpuBuffer(aligned_zeros(shape, dtype))

    def wrap(self, array: Array) -> CpuBuffer:
        return CpuBuffer(array)

    def _session(
        self, graph: bytes, constants: BoundConstants | None = None
    ) -> Any:  # Any: onnxruntime has no types
        options = self._options()
        more: dict[str, list[str]] = {}
        if constants is not None:
            _hand_over(self._runtime, options, constants)
            # Folding would keep a transposed copy of a constant beside the constant itself.
            more = {"disabled_optimizers": ["ConstantFolding"]}
        try:
            return self._runtime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"], **more
            )
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise EngineError(
                f"onnxruntime {self._runtime.__version__} refuses a graph: {_first_line(error)}",
                hint="update onnxruntime, or export the model again with tools/export_model.py",
            ) from error

    def _options(self) -> Any:  # Any: onnxruntime has no types
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._runtime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        # A remembered pattern asks the arena for one block beside those that it already holds:
        # measured with 1.32 on gpt-nano at 64 samples, 1119 MiB at the peak against 847.
        options.enable_mem_pattern = False
        # Threads that spin after a run steal the core from the next session: 92 ms against 56.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A stage has a dozen sessions and runs one at a time: they share one arena.
        options.add_session_config_entry("session.use_env_allocators", "1")
        return options


def _hand_over(
    runtime: Any,  # Any: onnxruntime has no types
    options: Any,  # Any: as above
    constants: BoundConstants,
) -> None:
    """Tell a session where its constants are: a folder to map files from, and arrays."""
    if constants.folder is not None and _knows_folders(runtime):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", constants.folder
        )
    names = list(constants.arrays)
    values = [runtime.OrtValue.ortvalue_from_numpy(constants.arrays[name]) for name in names]
    if names:
        options.add_external_initializers(names, values)


def open_engine(*, threads: int) -> Engine:
    """An engine on the installed onnxruntime.

    Raises:
        EngineError: onnxruntime is missing or damaged; the hint says what to install.
    """
    if threads < 1:
        raise InvariantBroken("an engine has at least one thread")
    return OnnxRuntimeEngine(threads=threads)


@functools.cache
def runtime_build() -> RuntimeBuild:
    """What computes on this peer; EngineError as `open_engine`."""
    runtime = import_onnxruntime()
    machine = builds.machine_name()
    return RuntimeBuild(
        runtime=builds.runtime_name(
            builds.installed_distributions(), has_training=_has_training(runtime)
        ),
        version=runtime.__version__,
        numpy=np.__version__,
        machine=machine,
        isa=builds.instruction_set_class(machine, builds.read_cpuinfo()),
    )


@functools.cache
def import_onnxruntime() -> Any:  # Any: onnxruntime has no types
    """The onnxruntime package with telemetry off, checked to be the one that was installed.

    Raises:
        EngineError: missing, damaged, or overwritten by another package.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    installed = builds.installed_distributions()
    reinstall = _REINSTALL.format(names=" ".join(sorted(builds.DISTRIBUTIONS)))
    try:
        with _training_api_left_out():
            import onnxruntime

        version, has_training = onnxruntime.__version__, _has_training(onnxruntime)
        onnxruntime.set_default_logger_severity(3)
    except ModuleNotFoundError as error:
        if installed or error.name != "onnxruntime":
            raise EngineError(f"onnxruntime is damaged: {error}", hint=reinstall) from error
        raise EngineError("onnxruntime is not installed", hint="pip install p2ptrain") from error
    except (ImportError, AttributeError, OSError) as error:
        raise EngineError(f"onnxruntime is damaged: {error}", hint=reinstall) from error
    problem = builds.installation_problem(
        installed, imported_version=version, has_training=has_training
    )
    if problem is not None:
        raise EngineError(problem, hint=reinstall)
    return onnxruntime


@contextlib.contextmanager
def _training_api_left_out() -> Iterator[None]:
    """Keep the training wheel from loading its Python API as it is imported.

    It looks there for ORTModule, which no peer uses, and gets onnx with it where that is
    installed, in an export environment torch as well: four fifths of the import's time.
    """
    with _IMPORT_LOCK:
        if _TRAINING_API in sys.modules:
            yield
            return
        sys.modules[_TRAINING_API] = None  # type: ignore[assignment]  # "refuse to import it"
        try:
            yield
        finally:
            del sys.modules[_TRAINING_API]


def aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """A zeroed contiguous array that starts on a cache line; at least one byte is allocated."""
    element = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * element.itemsize
    raw = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -int(raw.ctypes.data) % ALIGNMENT_BYTES
    return raw[start : start + size].view(element).reshape(shape)


_ARENA_LOCK: Final = threading.Lock()
"""A cache alone lets two threads both begin, and a second registration is refused."""


@functools.cache
def _share_arena(runtime: Any) -> None:  # Any: onnxruntime has no types
    """Register the process-wide arena that every session uses, once; it grows as requested."""
    memory = runtime.OrtMemoryInfo(
        "Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT
    )
    grow_as_requested = 1
    runtime.create_and_register_allocator(memory, runtime.OrtArenaCfg(0, grow_as_requested, -1, -1))


def _knows_folders(runtime: Any) -> bool:  # Any: onnxruntime has no types
    """Whether a session can be told the folder of its constants: from 1.20 on."""
    major, minor = runtime.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (1, 20)


def _has_training(runtime: Any) -> bool:  # Any: onnxruntime has no types
    return hasattr(runtime.capi._pybind_state, "GradientGraphBuilder")


def _address(buffer: Buffer) -> int:
    if not isinstance(buffer, CpuBuffer):
        raise InvariantBroken("a buffer of another engine")
    return buffer.address


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
