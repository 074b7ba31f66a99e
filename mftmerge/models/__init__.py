"""Checkpoints on disk and models in memory: reading, writing, and applying a mask to either."""
