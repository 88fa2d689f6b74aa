"""Find and describe the attention layers of a model: attention sites, and the rules that describe them."""
