"""Measuring real models and layers, sparse beside dense, in one run."""
