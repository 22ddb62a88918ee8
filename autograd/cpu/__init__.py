"""How kernels for the CPU are made: compiled by Numba, from vectors, panels, products, transforms and random words."""
