"""Robustness measured: clean accuracy, accuracy under attack, one row an image."""
