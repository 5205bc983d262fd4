"""What `scripts/benchmark_decode.py` compares, and how it is timed, checked and written down."""
