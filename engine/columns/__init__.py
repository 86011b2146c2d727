"""What a batch needs besides tokens: who gives which column, and the models that fill them."""
