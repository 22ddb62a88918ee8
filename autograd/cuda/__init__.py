"""How kernels for a GPU are made: sources compiled by CuPy, and products by cuBLAS. Nothing here imports CuPy by itself."""
