"""One module per model family that deviates from the generic resolution; found by scanning, so there is nothing to register."""
