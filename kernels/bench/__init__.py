"""`python -m kernels.bench`: what the operators reach on this machine, against what its memory and matrices allow."""
