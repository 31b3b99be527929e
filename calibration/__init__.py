"""What is learnt offline: block energy, masks, spatial repetition, and the store that holds them."""
