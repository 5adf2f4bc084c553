"""Pictures of one block of a model, before and after the passes."""
