"""How a solve starts, what it remembers of the past, and how it calibrates its output scale."""
