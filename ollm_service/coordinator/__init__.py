"""In what order do things happen? The use cases and the loops of a coordinator."""
