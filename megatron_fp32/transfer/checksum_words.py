"""Factors of the checksum in `checksum.py`, for its NumPy and its Triton form."""

PLACE, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
