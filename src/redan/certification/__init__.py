"""Bounds, proofs and counterexamples: networks read as graphs, and what can be shown of them for whole regions."""
