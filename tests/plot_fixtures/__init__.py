"""Synthetic result files for the tests of the figures and of the report."""
