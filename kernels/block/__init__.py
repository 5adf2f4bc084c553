"""Block-sparse products."""
