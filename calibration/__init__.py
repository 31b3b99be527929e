"""What CalibAtt learns offline: masks, spatial repetition, and the store that holds them."""
