"""Pictures of solutions, and reports on the calibration of their uncertainty."""
