"""Who gets how much credit. One idea of one paper per file; maths first, class last."""
