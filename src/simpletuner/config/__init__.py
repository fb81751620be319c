"""What a run is told: options, datasets, prompts. Read, merged and checked here, before torch is imported."""
