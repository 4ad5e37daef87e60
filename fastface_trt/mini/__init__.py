"""The mini model: drawn portraits and the small SDXL-shaped checkpoint trained on them."""
