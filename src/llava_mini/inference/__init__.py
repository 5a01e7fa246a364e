"""Questions about images and video, answered: what the command line, conversations and servers use."""
