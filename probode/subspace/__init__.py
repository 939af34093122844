"""A covariance that is full on a subspace of the components only, for large stiff systems."""
