"""Attention over KV pages: the index arrays of a step, three interchangeable backends, CUDA graphs of decode steps."""
