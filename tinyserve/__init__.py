"""tinyserve: the readable LLM inference engine for CPUs, in pure Python and Numba."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TinyserveError",
    "__version__",
]

if TYPE_CHECKING:
    from tinyserve.async_engine import AsyncEngine
    from tinyserve.errors import TinyserveError
    from tinyserve.llm import LLM, RequestOutput
    from tinyserve.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputs

_HOME = {
    "AsyncEngine": "tinyserve.async_engine",
    "BeamSearchParams": "tinyserve.sampling_params",
    "LLM": "tinyserve.llm",
    "RequestOutput": "tinyserve.llm",
    "SamplingParams": "tinyserve.sampling_params",
    "StructuredOutputs": "tinyserve.sampling_params",
    "TinyserveError": "tinyserve.errors",
}


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use, so that `import tinyserve` costs milliseconds."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'tinyserve' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
