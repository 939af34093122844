"""Square-root Gaussians: linear algebra, prediction, conditioning, coordinates, layouts, moments."""
