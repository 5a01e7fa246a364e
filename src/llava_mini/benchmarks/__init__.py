"""Measurements: what questions about images cost, beside other ways and other models, in one run each."""
