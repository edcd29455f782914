"""Foreign spellings: the same attention under the names, layouts and conventions of other libraries. Nowhere else."""
