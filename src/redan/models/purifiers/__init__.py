"""Purifiers: networks that make whole, clean images of noisy ones with holes."""
