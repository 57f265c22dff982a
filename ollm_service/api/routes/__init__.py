"""Which URL leads to which use case? One module per noun."""
