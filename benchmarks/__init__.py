"""Scripts that make the figures and sheets of this project again; results lie beside them."""
