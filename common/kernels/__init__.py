"""The decoder's named operations and the attention kernels: one file a kernel.

Each file holds the plain torch version (the paper's line), the fast version where there is one, and the choice between
them. `common/llama.py` calls the public functions and never learns which one ran.
"""
