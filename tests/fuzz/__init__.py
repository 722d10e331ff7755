"""Fuzz targets; see targets.py and run.py."""
