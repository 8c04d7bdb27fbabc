"""Models, losses and optimisers, and the loop that trains and evaluates them."""
