"""Data sets of classification; importing this package imports nothing."""
