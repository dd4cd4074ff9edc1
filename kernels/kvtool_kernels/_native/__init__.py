"""The loops of CPU twins, compiled by Numba on first use and kept on disk. Importing the folder imports no Numba."""
