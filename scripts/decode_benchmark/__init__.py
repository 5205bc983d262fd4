"""What `benchmark_decode.py` is made of: the contenders, the plan, the measuring, the result file, the figure."""
