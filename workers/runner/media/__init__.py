"""How do images and sounds become what a model is fed? Decoded here, then through the model's own processor."""
