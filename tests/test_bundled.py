"""The bundled models are what their recipes make."""
