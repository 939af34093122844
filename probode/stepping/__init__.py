"""One step, and the adaptive loop around it."""
