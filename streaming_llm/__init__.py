"""StreamingLLM (Xiao et al., ICLR 2024) for Hugging Face causal language models: exact, in constant memory."""

from importlib.metadata import PackageNotFoundError, version

from .blockwise import score_stream
from .config import StreamingConfig
from .custom_generate import streaming_generate
from .decoder import StreamingDecoder
from .engines import ENGINES, resolve_block_engine, resolve_engine
from .families import supported_families
from .kv_cache import StreamingKVCache
from .model import StreamingLLMWrapper
from .saving import read_metadata

try:
    __version__ = version("streaming-llm")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "unknown"

__all__ = [
    "ENGINES",
    "StreamingConfig",
    "StreamingDecoder",
    "StreamingKVCache",
    "StreamingLLMWrapper",
    "read_metadata",
    "resolve_block_engine",
    "resolve_engine",
    "score_stream",
    "streaming_generate",
    "supported_families",
]
