"""The kernel benchmark, `python -m kernels.bench`, compares the operators with the bandwidth and FLOPs of the machine."""
