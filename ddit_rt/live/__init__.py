"""The look at the live model: whether it is what its packages were compiled from."""
