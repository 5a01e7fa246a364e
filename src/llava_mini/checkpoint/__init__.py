"""Folders of weights in every layout: read, converted, exported."""
