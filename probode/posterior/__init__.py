"""What comes out: trajectories, smoothing, samples, solutions."""
