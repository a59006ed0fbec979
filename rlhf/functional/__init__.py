"""Pure tensor functions: torch and nothing else. Import them from their modules."""
