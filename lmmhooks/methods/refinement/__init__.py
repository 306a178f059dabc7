"""Methods that look at the image first and answer second, one per file."""
