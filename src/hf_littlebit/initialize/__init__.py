"""From a dense weight to the factors that a layer starts with, and what the errors of a weight cost (calibration.py)."""
