"""Scaling laws fitted to points, with intervals; ``factorlm.scaling`` has the public names."""
