"""Measuring alternatives and remembering what won."""
