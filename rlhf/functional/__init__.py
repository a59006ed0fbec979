"""Pure tensor functions that need torch alone; import them from their modules."""
