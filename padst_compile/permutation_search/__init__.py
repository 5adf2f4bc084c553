"""Which feature belongs where: from scores to permutations, by linear assignment."""
