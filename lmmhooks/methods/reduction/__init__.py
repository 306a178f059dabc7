"""Methods of kind reduction, one file each."""
