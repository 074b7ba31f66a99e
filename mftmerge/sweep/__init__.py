"""Training over a grid of settings and several seeds."""
