"""What `compile` writes and `load` reads: compiled blocks, their manifest, and where they live."""
