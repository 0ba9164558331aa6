"""Search over continuous batching: several samples of a prompt, one answer. One technique a file."""
