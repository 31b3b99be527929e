"""Records in; figures, a page and a verdict out. Never imports torch."""
