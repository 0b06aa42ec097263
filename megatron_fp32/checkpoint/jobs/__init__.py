"""Conversions as restartable jobs with several processes."""
