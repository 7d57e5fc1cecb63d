"""nano-sglang: a small, readable and fast LLM inference server in the style of SGLang."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.sampling_params import SamplingParams
    from sglang.server.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Imported on first use: a server's processes import this package, and few need these."""
    if name == "LLM":
        from sglang.server.llm import LLM

        return LLM
    if name == "SamplingParams":
        from sglang.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'sglang' has no attribute {name!r}")
