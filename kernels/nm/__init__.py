"""N:M-sparse products."""
