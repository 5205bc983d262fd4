"""StreamingLLM (Xiao et al., ICLR 2024) for Hugging Face causal language models: exact, in constant memory."""

from .blockwise import score_stream
from .config import StreamingConfig
from .decoder import StreamingDecoder
from .kv_cache import StreamingKVCache
from .model import StreamingLLMWrapper

__all__ = ["StreamingConfig", "StreamingDecoder", "StreamingKVCache", "StreamingLLMWrapper", "score_stream"]
