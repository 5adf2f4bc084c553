"""N:M products on sparse tensor cores, which multiply weights of 2:4: by cuSPARSELt, through PyTorch."""
