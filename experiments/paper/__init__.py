"""The tables and figures of Xiao et al. (2024) on any model: see `experiments/reproduce_paper.py`."""
