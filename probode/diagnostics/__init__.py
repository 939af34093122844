"""Pictures, and reports on calibration."""
