"""Training: dictionaries fitted to a stream of activations, one or many at once, in one or many processes."""
