"""The parts of `stream_chat.py`: turns of a conversation, sampling, text from tokens, what the terminal shows."""
