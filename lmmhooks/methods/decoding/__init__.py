"""Methods of kind decoding, one file each."""
