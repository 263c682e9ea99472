"""Operators: each has a plain torch reference (the specification), kernels for GPU and CPU, and one public function.

This file imports nothing, so that `import kernels` is fast; import an operator from its own file.
"""
