"""Operations on KV caches, each a folder with a plain PyTorch reference that defines it and fast twins that must agree.

`kvtool_kernels.ops` dispatches by device; `<op>/reference.py` is the definition; `<op>/cpu.py` and `<op>/triton.py`
are the twins; `<op>/spec.py` holds the shapes and tolerances that tests and benchmarks loop over.

Shapes: B batch, H query heads, K KV heads, G = H/K group, T query tokens, S key entries, D head dim.
"""
