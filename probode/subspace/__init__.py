"""A factorisation with an algebra of its own, for large stiff systems."""
