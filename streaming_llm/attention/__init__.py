"""How queries meet the kept keys: the interface to Transformers, the band of a block of tokens, and the kernels."""
