"""Checks of arguments, text representations of objects, options of XLA; independent of differential equations."""
