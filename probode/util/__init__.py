"""Checks of what users pass, what objects look like, options of XLA: nothing about differential equations."""
