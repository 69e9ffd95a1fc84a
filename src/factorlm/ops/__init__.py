"""Pure tensor functions y = f(x, factors), one file a structure."""
