"""Parts of vLLM that TRL's client imports."""
