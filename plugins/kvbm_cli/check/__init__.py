"""The verb `kvbm check`: reads a configuration as the connector would, and tries every tier, without vLLM."""
