"""Measures the server beside what users would take instead; README.md says how. Nothing of the product imports it."""
