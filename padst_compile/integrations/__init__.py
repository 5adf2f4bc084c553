"""Sparse training inside other training loops, sparse models in other model zoos; import the module of the one in use."""
