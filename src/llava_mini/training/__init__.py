"""What trains, how weights are updated, and the loop."""
