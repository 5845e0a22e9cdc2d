"""How a model and its optimizer are spread over ranks: one module a layout."""
