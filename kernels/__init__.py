"""Operators: each file holds a plain torch reference (the specification), the Triton kernel and the public function.

Nothing is imported here, so that `import kernels` costs nothing; take an operator from its own file.
"""
