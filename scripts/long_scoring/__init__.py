"""The parts of `score_long.py`: documents, tokens, the resumable scorer, what is written down."""
