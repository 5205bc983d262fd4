"""In the layout of the hub: ``model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, n_sink=4)``."""

from streaming_llm import StreamingLLMWrapper


def generate(model, n_sink=4, window_size=1020, engine="auto", **kwargs):
    """``model.generate`` by StreamingLLM: exact, in constant memory.

    Args:
        model: a causal language model of a supported family.
        n_sink: first tokens of the stream that are never evicted.
        window_size: recent tokens kept.
        engine: see ``streaming_llm.StreamingLLMWrapper``.
        kwargs: what ``model.generate`` takes.
    """
    with StreamingLLMWrapper(model, n_sink, window_size, engine) as stream:
        return stream.generate(**kwargs)
