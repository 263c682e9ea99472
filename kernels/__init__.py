"""Operators: a plain torch reference (the specification), the kernels for GPU and CPU, and one public function each.

This file imports nothing, so that `import kernels` costs nothing; import an operator from its own file.
"""
