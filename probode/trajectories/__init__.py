"""Whole trajectories at once: boundary value problems and periodic orbits, by one linear system over a mesh."""
