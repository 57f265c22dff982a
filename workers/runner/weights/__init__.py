"""How does a model run whose weights do not all fit? From extents of our own on disk, a layer at a time."""
