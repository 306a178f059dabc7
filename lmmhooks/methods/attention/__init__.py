"""Methods of kind attention, one file each."""
