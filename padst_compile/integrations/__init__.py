"""Sparse training inside other training loops; import the module of the one in use."""
