"""Merges that are learnt: which weights take which expert's change, from a few rows of each domain."""
