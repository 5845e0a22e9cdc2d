"""Who owns which slice of the weights, one module per layout."""
