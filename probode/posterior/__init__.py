"""The posterior of a solve: smoothing, dense output, samples, and the ``Solution`` that a solve returns."""
