"""A drawn world in which every question has a known answer."""
