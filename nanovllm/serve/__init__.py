"""The OpenAI-compatible HTTP server: the gate decides who comes in, the surface what is asked and answered."""
