"""What attention layers there are in a model: sites, and the rules that describe them."""
