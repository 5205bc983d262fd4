"""The parts of `stream_chat.py`: turns as tokens, tokens as text, and the talk itself."""
