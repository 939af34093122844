"""What a solve conditions on: equations, linearised, and data."""
