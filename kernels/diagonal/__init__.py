"""Diagonal-sparse products."""
