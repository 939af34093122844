"""Initial states, filtering or smoothing, and calibration of the output scale."""
