"""What Numba compiles: the only modules that import it, and only where no compiled code is in the cache."""
