"""The orthonormal Walsh–Hadamard transform of the last dimension."""
