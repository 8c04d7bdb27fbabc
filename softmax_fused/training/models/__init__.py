"""Models, losses, and the loop that trains and evaluates them."""
