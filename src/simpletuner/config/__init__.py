"""A run's configuration: options, datasets and prompts. Read, merged and checked before torch is imported."""
