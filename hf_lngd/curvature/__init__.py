"""Curvature of a layer: what is captured, the factors made of it, their inverses. Needs torch only."""
