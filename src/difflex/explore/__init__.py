"""Search and look at the features of a study."""
