"""Records of questions and answers about pictures, where they come from, and batches of them."""
